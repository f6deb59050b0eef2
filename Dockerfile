# One image for a TPU VM, a GPU machine or a CPU: docker build --build-arg EXTRA=tpu -t fineline .
FROM python:3.11-slim
ARG EXTRA=""
WORKDIR /opt/fineline
COPY requirements.lock pyproject.toml setup.py README.md ./
COPY fineline_jax fineline_jax
COPY configs configs
COPY train train
COPY eval eval
# EXTRA: tpu, cuda12 or cuda13 (jax's own wheels); gs or s3 for buckets; comma-separated.
RUN pip install --no-cache-dir -c requirements.lock ".${EXTRA:+[$EXTRA]}"
# A run and its scores are written below the working directory: mount it.
WORKDIR /work
ENTRYPOINT ["fineline"]
CMD ["--help"]
