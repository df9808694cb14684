PYTHON ?= python3
BIN := .venv/bin
RUNS ?= runs

help:  ## this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: .venv/installed  ## install, distil the tiny SD3 pipeline with LADD, and show where the images are (minutes on a laptop CPU)
	$(BIN)/distill fit --config recipes/tiny_ladd.yaml --ckpt_path last --trainer.default_root_dir $(RUNS)/demo
	$(BIN)/python benchmarks/demo.py --run $(RUNS)/demo

test: .venv/installed lint  ## lint, types and tests
	$(BIN)/python -m pytest -n 3 --dist worksteal tests

lint: .venv/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/installed  ## the documentation as a site in build/site
	$(BIN)/mkdocs build --strict

ASSETS := build/assets
DISTILL := $(BIN)/distill
assets: .venv/installed  ## rebuild the shipped tiny pipelines, judge, vision network and perceptual distances (hours on a laptop CPU)
	$(DISTILL) fit --ckpt_path last --config recipes/assets/judge.yaml
	$(DISTILL) fit --ckpt_path last --config recipes/assets/small_judge.yaml
	$(DISTILL) fit --ckpt_path last --config recipes/assets/autoencoder.yaml
	$(DISTILL) fit --ckpt_path last --config recipes/assets/text_encoders.yaml
	$(DISTILL) fit --ckpt_path last --config recipes/assets/tiny_vit.yaml
	for name in tiny-sd3 tiny-sd; do \
	  $(BIN)/python -m distill.tiny.assemble $$name $(ASSETS) $(ASSETS)/untrained/$$name || exit 1; done
	$(DISTILL) fit --ckpt_path last --config recipes/assets/tiny_sd3.yaml
	$(DISTILL) export --checkpoint $(ASSETS)/tiny-sd3-stage1/checkpoints/last.ckpt --output $(ASSETS)/trained/tiny-sd3-stage1
	$(DISTILL) fit --ckpt_path last --config recipes/assets/tiny_sd3_stage2.yaml
	$(DISTILL) fit --ckpt_path last --config recipes/assets/tiny_sd.yaml
	for name in latent_trunk latent_lpips lpips_trunk lpips; do \
	  $(DISTILL) fit --ckpt_path last --config recipes/assets/$$name.yaml || exit 1; done
	cp $(ASSETS)/shapes_judge.safetensors $(ASSETS)/small_judge.safetensors $(ASSETS)/tiny-latent-lpips.safetensors $(ASSETS)/tiny-lpips.safetensors distill/assets/
	rm -rf distill/assets/tiny-vit && cp -r $(ASSETS)/tiny-vit distill/assets/
	for name in tiny-sd3 tiny-sd; do \
	  $(DISTILL) export --checkpoint $(ASSETS)/$$name/checkpoints/last.ckpt --half true --output distill/assets/$$name \
	    || exit 1; done

clean:  ## remove the environment and what was built; runs/ stays
	rm -rf .venv build

.PHONY: help demo test lint docs assets clean
.DEFAULT_GOAL := help
