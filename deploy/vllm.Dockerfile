# vLLM with dami's plugin. From the root of the checkout:
#     docker build -f deploy/vllm.Dockerfile -t dami-vllm:0.1.0 .
ARG VLLM=v0.33.0

FROM vllm/vllm-openai:${VLLM} AS build
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
# Built here for this image's Python and libc. DAMI_CUDA=1 also builds the CUDA C++ kernel, where the image has nvcc.
ARG DAMI_CUDA=0
RUN DAMI_CUDA="${DAMI_CUDA}" python3 -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:${VLLM}
# vLLM's own torch and transformers stay: pip keeps what satisfies the package.
RUN --mount=from=build,source=/wheels,target=/wheels python3 -m pip install --no-cache-dir /wheels/*.whl
RUN useradd --uid 10001 --create-home dami && install -d -o dami -g dami /models
ENV HOME=/home/dami HF_HOME=/models
VOLUME /models
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
