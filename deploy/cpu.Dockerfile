# A server on a CPU: docker build -f deploy/cpu.Dockerfile -t heron .
FROM python:3.12-slim-bookworm
RUN useradd --create-home heron
WORKDIR /opt/heron
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY docs/pypi.md docs/pypi.md
COPY heron heron
RUN pip install --no-cache-dir --constraint constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]'
USER heron
EXPOSE 8000
HEALTHCHECK --interval=30s --start-period=120s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["heron", "serve", "--host", "0.0.0.0", "--api_key_file", "/run/secrets/heron_key"]
CMD ["/models/model.pth"]
