# One image for every process of Headrace: worker, batch, Luigi's scheduler, Feast's servers. The command says which.

FROM golang:1.26-bookworm AS scheduler
RUN CGO_ENABLED=0 GOBIN=/out go install github.com/aptible/supercronic@v0.2.48

FROM python:3.12-slim-bookworm AS environment
RUN python -m venv /opt/headrace
COPY requirements-runtime.lock /tmp/
RUN /opt/headrace/bin/pip install --no-cache-dir --require-hashes -r /tmp/requirements-runtime.lock
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY headrace headrace
COPY streaming streaming
COPY batch batch
RUN /opt/headrace/bin/pip install --no-cache-dir --no-deps .

FROM python:3.12-slim-bookworm
RUN useradd --uid 10001 --no-create-home --home-dir /srv headrace \
    && install -d -o headrace -g headrace /srv /srv/data /srv/state
COPY --from=scheduler /out/supercronic /usr/local/bin/supercronic
COPY --from=environment /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TZ=UTC
WORKDIR /srv
COPY luigi.cfg ./
COPY feature_repo feature_repo
USER headrace
# Compose mounts the feature repository over the one here; data, receipts and the scheduler's state are volumes.
VOLUME ["/srv/data", "/srv/state"]
CMD ["faust", "-A", "streaming", "worker", "-l", "info"]
