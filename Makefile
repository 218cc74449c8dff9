# `make quantize` and `make test` set up everything they need by themselves.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
SAM2JQ := $(VENV)/bin/sam2jq
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
CONFIG ?= experiments/demo_w8.yaml experiments/demo_w4.yaml
ARGS ?=

.PHONY: setup quantize segment track evaluate inspect export demo-model test lint bench
setup: $(READY)

# sam2 comes as source and is built against the torch that is there: in its own build environment it would fetch
# gigabytes of another one.
$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 torchvision==0.28.0 setuptools wheel
	SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation sam2==1.1.0
	$(PIP) --no-build-isolation --editable '.[torch,hub,eval,dev]'
	touch $@

# make quantize CONFIG=experiments/hiera_tiny_w4.yaml ARGS="--model.checkpoint sam2.1_hiera_tiny.pt --quant.calib.path photos"
quantize: setup
	$(foreach config,$(CONFIG),$(SAM2JQ) quantize --config $(config) $(ARGS) &&) true

# make segment IMAGE=photo.jpg ARGS="--points 500,375 --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
IMAGE ?= scenes:2002/0002
segment: ARGS := $(or $(ARGS),--points 75,60 --model.name nano)
segment: setup
	$(SAM2JQ) segment $(IMAGE) $(ARGS)

# make track CLIP=clip.mp4 ARGS="--box 100,80,300,400 --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
CLIP ?= scenes:2002/0002
track: ARGS := $(or $(ARGS),--points 75,60 --model.name nano)
track: setup
	$(SAM2JQ) track $(CLIP) $(ARGS)

# make evaluate CONFIG=experiments/demo_clips.yaml ARGS="--data sa-v --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
evaluate: CONFIG := $(if $(filter file,$(origin CONFIG)),experiments/demo_images.yaml,$(CONFIG))
evaluate: setup
	$(foreach config,$(CONFIG),$(SAM2JQ) evaluate --config $(config) $(ARGS) &&) true

# trains the demo model anew, over hours, and goes on where it was stopped
demo-model: setup
	$(VENV)/bin/python experiments/demo_model/train.py $(ARGS)

# make inspect PACKAGE=outputs/sam2/hiera_tiny_w4/package.pt
PACKAGE ?= outputs/demo_w4/package.pt
inspect: setup
	$(SAM2JQ) inspect $(PACKAGE)

# make export PACKAGE=outputs/sam2/hiera_tiny_w4a4/package.pt ARGS="--to nunchaku --out files"
export: ARGS := $(or $(ARGS),--to vanilla --out outputs/exported)
export: setup
	$(SAM2JQ) export --package $(PACKAGE) $(ARGS)

test: setup
	$(VENV)/bin/pytest $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: setup
	$(VENV)/bin/python experiments/bench/encoder.py
	$(VENV)/bin/python experiments/bench/ptq.py
