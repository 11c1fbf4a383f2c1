# The server (docs/serve.md), as an image.
#   docker build -t kangaroo-jax .                                        CPU
#   docker build -t kangaroo-jax --build-arg EXTRAS=serve,cuda .          NVIDIA: JAX's wheels bring CUDA's libraries
#   docker build -t kangaroo-jax --build-arg EXTRAS=serve,tpu .           TPU
#   ... --build-arg BASE=IMAGE                                            another base, with Python 3.11 or newer and pip
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG EXTRAS=serve
WORKDIR /kangaroo-jax
COPY pyproject.toml README.md LICENSE ./
COPY kangaroo_jax kangaroo_jax
RUN pip install --no-cache-dir ".[${EXTRAS}]" && useradd --create-home --uid 1000 kangaroo
# Not in the source folder: the installed package is the one that runs.
WORKDIR /home/kangaroo
USER 1000
ENV JAX_COMPILATION_CACHE_DIR=/home/kangaroo/compiled
EXPOSE 8000
ENTRYPOINT ["kangaroo-serve", "--host=0.0.0.0"]
