# heddle: one 4-bit base resident, a different adapter for every request.
#   docker build -t heddle .
#   docker run --rm -v heddle-store:/var/lib/heddle heddle keys create --tenant local --scope admin
#   docker run --gpus all -p 8000:8000 -v heddle-store:/var/lib/heddle heddle serve Qwen/Qwen2.5-7B-Instruct
FROM python:3.12-slim

# Triton compiles a small launcher when a kernel first runs.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/heddle
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server server
COPY kernels kernels
COPY adapters adapters
COPY loadtest loadtest
COPY demo demo
RUN pip install --no-cache-dir --constraint constraints.txt .

RUN useradd --create-home --uid 1000 heddle \
 && install --directory --owner=heddle /var/lib/heddle
USER heddle
VOLUME /var/lib/heddle
ENV HEDDLE_STORE=/var/lib/heddle \
    HEDDLE_HOST=0.0.0.0 \
    HF_HOME=/var/lib/heddle/huggingface
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10m \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["heddle"]
