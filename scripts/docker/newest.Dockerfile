# The newest transformers that llava_patch was run with.
# docker build -f scripts/docker/newest.Dockerfile -t llava_patch:newest . && docker run -it llava_patch:newest llava-patch doctor
FROM python:3.11-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /llava_patch
COPY . .
ENV LLAVA_PATCH_VENV=/opt/venv LLAVA_PATCH_LOCK=newest
RUN bash scripts/install.sh && rm -rf /root/.cache
ENV PATH=/opt/venv-newest/bin:$PATH
CMD ["llava-patch", "doctor"]
