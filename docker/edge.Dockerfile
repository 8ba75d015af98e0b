# Python with what an exported package needs alone: onnxruntime, tokenizers, NumPy, Pillow. Build in the folder above this one:
#   docker build -f docker/edge.Dockerfile -t fusion-edge .
#   docker run --rm -v ./PACKAGE:/model:ro fusion-edge                                       # loads it, prints its inputs and answers
#   docker run --rm -v ./PACKAGE:/model:ro -v ./app.py:/app.py:ro fusion-edge /app.py        # fusion.load("/model").predict(...)
# For other processors: docker build --platform linux/arm64 ...
ARG PYTHON=3.12-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY fusion fusion
COPY recipes recipes
COPY data data
RUN python -m venv /venv \
    && /venv/bin/pip install --no-cache-dir --no-compile ".[edge]" \
    && /venv/bin/pip uninstall --yes pip \
    && find /venv -name __pycache__ -prune -exec rm -r {} +

FROM python:${PYTHON}
RUN groupadd --gid 10001 fusion \
    && useradd --uid 10001 --gid fusion --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin fusion
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
STOPSIGNAL SIGTERM
HEALTHCHECK NONE
ENTRYPOINT ["python"]
CMD ["-c", "import fusion; model = fusion.load('/model'); print(*model.modalities); print(*model.answering.names)"]
