# Two commands do everything on a fresh Debian machine:
#   make run    installs what is missing, builds, and runs the bundled model with a full and with a small cache
#   make test   installs what is missing, builds and runs all tests
BUILD ?= build/release
JOBS ?= $(shell nproc)

CTEST := ctest -j 2 --output-on-failure

.PHONY: run test bench bench-check build sanitize packages clean

packages:
	@tools/install_packages.sh

build: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS)

run: build
	@tools/demo.sh $(BUILD)/apps/lesskv/lesskv

test: build
	$(CTEST) --test-dir $(BUILD)

# Unit tests once more under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: packages
	cmake --preset sanitize
	cmake --build build/sanitize -j $(JOBS)
	$(CTEST) --test-dir build/sanitize -LE slow

bench: build
	@for program in $(BUILD)/bench/*_bench; do [ ! -x $$program ] || $$program || exit 1; done

# Hot kernels against their scalar references in one run; fails when one has become much slower.
bench-check: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS) --target bench_check
	@$(BUILD)/bench/bench_check

clean:
	rm -rf build
