#!/bin/sh
# Makes the role that the nodes work as, when the database's folder is made (compose.yaml).
# It owns nothing; `orbit db upgrade` gives it what it needs.
set -eu
psql --set ON_ERROR_STOP=1 --set password="$ORBIT_PASSWORD" --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" <<'SQL'
CREATE ROLE orbit LOGIN PASSWORD :'password';
SQL
