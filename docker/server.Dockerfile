# Serves an exported package over HTTP on port 8000: fusion serve /model. Build in the folder above this one:
#   docker build -f docker/server.Dockerfile -t fusion-server .
#   docker run --rm --init -p 8000:8000 -v ./PACKAGE:/model:ro fusion-server
# Further options of fusion serve follow the image's name: ... fusion-server /model --host 0.0.0.0 --batch_size 64
# A run instead of a package needs PyTorch: --build-arg EXTRAS=serve,train
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
ARG EXTRAS=serve
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY fusion fusion
COPY recipes recipes
COPY data data
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --no-compile ".[${EXTRAS}]" \
    && /venv/bin/pip uninstall --yes pip \
    && find /venv -name __pycache__ -prune -exec rm -r {} +

FROM python:${PYTHON}
RUN groupadd --gid 10001 fusion \
    && useradd --uid 10001 --gid fusion --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin fusion
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# Answers what it has admitted, then ends with status 0.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
ENTRYPOINT ["fusion", "serve"]
CMD ["/model", "--host", "0.0.0.0", "--port", "8000"]
