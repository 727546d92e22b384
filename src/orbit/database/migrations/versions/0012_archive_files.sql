-- Archived weeks as files: which were written beside telemetry_archive.
--
--   telemetry_archive_file  fact: a Parquet file that was written and read back

CREATE TABLE telemetry_archive_file (
    week       date NOT NULL,
    sha256     bytea NOT NULL CHECK (octet_length(sha256) = 32),
    file       text NOT NULL,
    events     bigint NOT NULL,
    bytes      bigint NOT NULL,
    written_at timestamptz NOT NULL DEFAULT orbit_now(),
    PRIMARY KEY (week, sha256)
);
COMMENT ON TABLE telemetry_archive_file IS 'A Parquet file with an archived week, by its name and the SHA-256 of its bytes; every row of it was compared with the archive before the week was dropped.';

SELECT orbit_append_only('telemetry_archive_file');
