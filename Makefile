# `make quantize` and `make test` set up everything they need by themselves.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/ready
SAM2JQ := $(VENV)/bin/sam2jq
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt
CONFIG ?= experiments/demo_w8.yaml experiments/demo_w4.yaml
ARGS ?=
# A training step allocates gigabytes anew. With huge pages it is a tenth faster, where malloc is glibc's.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.PHONY: setup quantize distill sweep report segment track evaluate inspect export demo-model
.PHONY: test test-end-to-end test-default-xla lint typecheck bench peers compile-check
.PHONY: docs docs-check pictures mask-pictures
setup: $(READY)

# sam2 is built from source against the installed torch. In an isolated build environment pip would download another
# torch of several gigabytes.
$(READY): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0 torchvision==0.28.0 setuptools wheel
	SAM2_BUILD_CUDA=0 $(PIP) --no-build-isolation sam2==1.1.0
	$(PIP) --no-build-isolation --editable '.[torch,hub,eval,docs,dev]'
	touch $@

# make quantize CONFIG=experiments/hiera_tiny_w4.yaml \
#   ARGS="--model.checkpoint sam2.1_hiera_tiny.pt --quant.calib.path photos"
quantize: setup
	$(foreach config,$(CONFIG),$(SAM2JQ) quantize --config $(config) $(ARGS) &&) true

# make sweep CONFIG=experiments/hiera_tiny_w4.yaml OVER="quant.wgts.dtype=sint8,sint4 seed=1,2" \
#   ARGS="--model.checkpoint ..."
OVER ?= quant.wgts.dtype=sint8,sint6,sint5,sint4,sint3
sweep: CONFIG := $(if $(filter file,$(origin CONFIG)),experiments/demo_w4.yaml,$(CONFIG))
sweep: setup
	$(SAM2JQ) sweep --config $(CONFIG) $(foreach over,$(OVER),--over '$(over)') $(ARGS)

# make report RUNS="outputs/demo_w8 outputs/demo_w4" OUT=comparison.html
RUNS ?= outputs/demo_w8 outputs/demo_w4
OUT ?= comparison.html
report: setup
	$(SAM2JQ) report $(RUNS) --out $(OUT) $(ARGS)

# make distill CONFIG=experiments/cdpq_small_to_tiny.yaml ARGS="--data.train sa-v --data.val sa-v"
distill: CONFIG := $(if $(filter file,$(origin CONFIG)),experiments/cdpq_nano.yaml,$(CONFIG))
distill: setup
	$(foreach config,$(CONFIG),$(HUGE_PAGES) $(SAM2JQ) distill --config $(config) $(ARGS) &&) true

# make segment IMAGE=photo.jpg ARGS="--points 500,375 --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
IMAGE ?= scenes:2002/0002
CLICK := --points 75,60 --model.name nano
segment: ARGS := $(or $(ARGS),$(CLICK))
segment: setup
	$(SAM2JQ) segment $(IMAGE) $(ARGS)

# make track CLIP=clip.mp4 ARGS="--box 100,80,300,400 --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
CLIP ?= scenes:2002/0002
track: ARGS := $(or $(ARGS),$(CLICK))
track: setup
	$(SAM2JQ) track $(CLIP) $(ARGS)

# make evaluate CONFIG=experiments/demo_clips.yaml \
#   ARGS="--data sa-v --model.name tiny --model.checkpoint sam2.1_hiera_tiny.pt"
evaluate: CONFIG := $(if $(filter file,$(origin CONFIG)),experiments/demo_images.yaml,$(CONFIG))
evaluate: setup
	$(foreach config,$(CONFIG),$(SAM2JQ) evaluate --config $(config) $(ARGS) &&) true

# Trains the demo model from scratch, which takes hours. A stopped run is resumed.
demo-model: setup
	$(HUGE_PAGES) $(VENV)/bin/python experiments/demo_model/train.py $(ARGS)

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

# Whole runs of commands, and models of the larger sizes. CI runs them too.
test-end-to-end: setup
	$(VENV)/bin/pytest -m "end_to_end and not slow" $(ARGS)

# `make test` turns off most of XLA's optimizations, since compiling is most of its time. This runs the tests of
# exactness with XLA's default flags, as users run.
DEFAULT_XLA := tests/models/test_parity.py tests/predictors/test_image.py tests/quant/algorithms/test_gptq.py
DEFAULT_XLA += tests/converters/exports/test_package.py
DEFAULT_XLA += tests/predictors/test_video.py::test_two_objects_over_twelve_frames_match_the_original
test-default-xla: setup
	SAM2JQ_XLA_DEFAULTS=1 $(VENV)/bin/pytest -m "not slow" $(DEFAULT_XLA) $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# the types of the public modules; [tool.mypy] in pyproject.toml lists them
typecheck: setup
	$(VENV)/bin/mypy

bench: setup
	$(VENV)/bin/python experiments/bench/encoder.py
	$(VENV)/bin/python experiments/bench/images.py
	$(VENV)/bin/python experiments/bench/video.py
	$(VENV)/bin/python -m experiments.bench.deploy
	$(VENV)/bin/python experiments/bench/ptq.py
	$(VENV)/bin/python experiments/bench/startup.py
	$(HUGE_PAGES) $(VENV)/bin/python experiments/bench/distill.py

# The demo model quantized by this program and by public libraries, which are in an environment of their own:
# make peers ARGS=hqq for the rows of one library.
PEERS := .peers
peers: $(PEERS)/ready
	mkdir -p build
	$(PEERS)/bin/python -m experiments.peers.table $(ARGS) > build/peers.md
	mv build/peers.md experiments/peers/table.md

$(PEERS)/ready: experiments/peers/requirements.txt pyproject.toml constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 setuptools
	$(PEERS)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation \
	  --requirement experiments/peers/requirements.txt --editable '.[torch,onnx]'
	touch $@

# Compiles the programs for accelerators that are not here. Their compilers are kept apart, so that nothing else here
# looks for a TPU or a GPU: make compile-check ARGS="--quick", or with CUDA=1 (625 MB) for H100 too.
COMPILERS := .compilers
LIBTPU := libtpu==0.0.42
CUDA_COMPILER := jax-cuda12-plugin==0.10.2 jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12==12.9.86
CUDA_COMPILER += nvidia-cuda-runtime-cu12==12.9.79 nvidia-cuda-cupti-cu12==12.9.79
compile-check: setup $(COMPILERS)/tpu $(if $(CUDA),$(COMPILERS)/cuda)
	PYTHONPATH=$(COMPILERS) $(VENV)/bin/python experiments/bench/compile.py --out experiments/bench/compile.md \
	  --targets v5e v6e $(if $(CUDA),h100) $(ARGS)

$(COMPILERS)/tpu: | setup
	$(PIP) --no-deps --target $(COMPILERS) $(LIBTPU)
	touch $@

$(COMPILERS)/cuda: | setup
	$(PIP) --no-deps --target $(COMPILERS) $(CUDA_COMPILER)
	touch $@

# the API reference, from the docstrings: build/docs/index.html
docs: setup
	$(VENV)/bin/python docs/reference.py build/docs

# Runs every command and program of docs/ that needs no files but those of the project.
docs-check: setup
	PATH=$(CURDIR)/$(VENV)/bin:$$PATH $(VENV)/bin/python docs/check.py

# The pictures of docs/segment.md.
mask-pictures: setup
	$(SAM2JQ) segment $(IMAGE) --model.checkpoint demo --everything --everything.points_per_side 16 \
	  --everything.pred_iou_thresh 0.7 --everything.stability_score_thresh 0.7 --everything.min_mask_region_area 30 \
	  --out docs/everything.jpg
	$(SAM2JQ) track $(CLIP) --model.checkpoint demo --prompts docs/prompts.json --out docs/tracked.jpg

# The pictures of README.md and docs/, from runs of the demo model. Needs Chromium and chromedriver.
pictures: OVER := quant.wgts.dtype=sint8,sint6,sint5,sint4 quant.wgts.kernel_gptq=null,{}
pictures: ARGS := --measure.num_images 48 --measure.clips scenes:2002 --measure.num_clips 4 --output.job demo_sweep
pictures: sweep
	$(VENV)/bin/python docs/pictures.py outputs/demo_sweep
