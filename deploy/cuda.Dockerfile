# A server on an NVIDIA GPU; the image has nvcc, since the kernels are built at their first use:
# docker build -f deploy/cuda.Dockerfile -t heron .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ ninja-build \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home heron
WORKDIR /opt/heron
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY docs/pypi.md docs/pypi.md
COPY heron heron
RUN python3 -m venv /opt/venv && /opt/venv/bin/pip install --no-cache-dir --constraint constraints.txt '.[serve]'
USER heron
ENV PATH=/opt/venv/bin:$PATH HERON_CACHE=/home/heron/.cache/heron
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=300s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["heron", "serve", "--host", "0.0.0.0", "--api_key_file", "/run/secrets/heron_key", "--device", "cuda"]
CMD ["/models/model.pth"]
