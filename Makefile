PYTHON ?= python3
BIN    := .venv/bin
READY  := .venv/.installed
PEERS  := bench/.peers/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lab nbs gpu readme evidence tables results zoo bench clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

demo: $(READY)  ## compress a real network on real images: runs/demo/report.html
	$(BIN)/kdnb compress --recipe vbgs-kd --data digits --out runs/demo --force

test: $(READY)  ## run the notebooks, then pytest; LONG=1: what takes long, papers and tutorials too; KDNB_DATA=folder adds real MNIST, KDNB_DEVICE=cuda runs pytest on a GPU
	$(BIN)/nbdev-test --n-workers 2 $(if $(LONG),--flags long,--skip-folder-re '^([_.]|papers|tutorials)')
	$(BIN)/python -m pytest -n 2 --dist worksteal $(if $(LONG),,-m "not long")
	-@$(BIN)/python .ci/measure.py

lab: $(READY)  ## open JupyterLab on nbs/
	cd nbs && ../$(BIN)/jupyter lab --config=../.ci/lab.py

nbs: $(READY)  ## run notebooks for keeps: make nbs [NB=nbs/02d_data.sets.ipynb] [FLAGS=slow]
	$(BIN)/nbdev-export
	$(BIN)/python .ci/nbs.py $(NB) --flags "$(FLAGS)"

gpu: $(READY)  ## run the GPU cells of the notebooks and keep what they show; without CUDA in small: make gpu [MINUTES=10] [JOBS=10] [NB=...]
	$(BIN)/python -W ignore::FutureWarning .ci/gpu.py $(NB) --minutes $(or $(MINUTES),10) --jobs $(or $(JOBS),10)

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(BIN)/python .ci/nbs.py --readme

evidence: $(READY)  ## go on with the grids in results/: make evidence [MINUTES=60] [JOBS=2] [PAPERS="prue vid"]
	@case "$(MINUTES)$(JOBS)" in *[!0-9.]*) echo 'MINUTES and JOBS are numbers, such as MINUTES=60'; exit 2;; esac
	$(BIN)/python -W ignore::FutureWarning -c "from kdnb.evidence import gather; print(gather($(or $(MINUTES),60), $(or $(JOBS),2), '$(PAPERS)'.split()).to_string(index=False))"

tables: $(READY)  ## compute tables and figures again from the rows in results/
	$(BIN)/python .ci/nbs.py --only rows

results: $(READY)  ## train for the numbers in results/
	$(BIN)/python results/vbgs_kd.py
	$(BIN)/python results/variational.py

zoo: $(READY)  ## prune networks that nobody here wrote, and go on where results/zoo.csv ends: make zoo [MINUTES=60] [PART=3/10]
	$(BIN)/python tests/zoo.py --minutes $(or $(MINUTES),60) --part $(or $(PART),1/1)

# freed memory stays in the process: else page faults fall on one variant or another
bench: export MALLOC_TRIM_THRESHOLD_ = 1000000000
bench: export MALLOC_MMAP_THRESHOLD_ = 33554432
bench: $(READY) $(PEERS)  ## what a step costs
	$(BIN)/python bench/variational_cost.py
	$(BIN)/python bench/distill_cost.py
	$(BIN)/python bench/prune_cost.py
	$(BIN)/python bench/export_cost.py
	$(BIN)/python bench/run_cost.py

clean:  ## remove what can be made again, but not .venv and runs/
	rm -rf build dist *.egg-info .pytest_cache _proc _docs
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv, once: about 6 GB, a few minutes"
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

$(PEERS): bench/requirements.txt | $(READY)
	-$(BIN)/python -m pip install -q --no-deps --upgrade --target bench/.peers -r $< && touch $@
