# The stack that every figure in the README was measured on.
# docker build -f scripts/docker/main.Dockerfile -t llava_patch:main . && docker run -it llava_patch:main llava-patch doctor
FROM python:3.11-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /llava_patch
COPY . .
ENV LLAVA_PATCH_VENV=/opt/venv LLAVA_PATCH_LOCK=main
RUN bash scripts/install.sh && rm -rf /root/.cache
ENV PATH=/opt/venv/bin:$PATH
CMD ["llava-patch", "doctor"]
