# One image for every process of Headrace: worker, batch, Luigi's scheduler, Feast's servers. The command says which.
# It runs as an ordinary user on a read-only root file system: what is written goes to /srv/data, /srv/state, /tmp and,
# by the luigi command, to /srv/.luigi-locks. docs/how-to/deploy.md says how to pin the bases by digest.

FROM golang:1.26.5-bookworm AS scheduler
RUN CGO_ENABLED=0 GOBIN=/out go install -trimpath -ldflags=-s github.com/aptible/supercronic@v0.2.48

FROM python:3.12.13-slim-bookworm AS environment
RUN python -m venv --without-pip /opt/headrace
COPY requirements-runtime.lock /tmp/
RUN pip --python /opt/headrace/bin/python install --no-cache-dir --require-hashes -r /tmp/requirements-runtime.lock
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY headrace headrace
COPY streaming streaming
COPY batch batch
RUN pip --python /opt/headrace/bin/python install --no-cache-dir --no-deps .

FROM python:3.12.13-slim-bookworm
# Nothing is installed here later: pip is not needed any more.
RUN useradd --uid 10001 --no-create-home --home-dir /srv headrace \
    && install -d -o headrace -g headrace /srv/data /srv/state /srv/.luigi-locks \
    && pip uninstall --yes --root-user-action=ignore pip
COPY --from=scheduler /out/supercronic /usr/local/bin/supercronic
COPY --from=environment /opt/headrace /opt/headrace
ENV PATH=/opt/headrace/bin:$PATH \
    HOME=/srv \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    TZ=UTC
WORKDIR /srv
COPY luigi.cfg ./
COPY feature_repo feature_repo
USER 10001:10001
# Compose mounts the feature repository over the one here; data, receipts and the scheduler's state are volumes.
VOLUME ["/srv/data", "/srv/state"]
CMD ["faust", "-A", "streaming", "worker", "-l", "info"]
