# What LLaVA itself pins.
# docker build -f scripts/docker/llava_pinned.Dockerfile -t llava_patch:llava_pinned . && docker run -it llava_patch:llava_pinned llava-patch doctor
FROM python:3.11-slim
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends build-essential git && rm -rf /var/lib/apt/lists/*
WORKDIR /llava_patch
COPY . .
ENV LLAVA_PATCH_VENV=/opt/venv LLAVA_PATCH_LOCK=llava_pinned
RUN bash scripts/install.sh && rm -rf /root/.cache
ENV PATH=/opt/venv-llava_pinned/bin:$PATH
CMD ["llava-patch", "doctor"]
