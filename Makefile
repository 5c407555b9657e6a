# The commands of this repository. `make help` lists them.

CARGO ?= cargo

.PHONY: help test test-full interleavings check bench fuzz demo install-test-tools

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 24

demo: ## Tell the whole story on a real image
	$(CARGO) run --release -- demo

test: install-test-tools ## Install what the tests need (QEMU's tools, NBD clients) and run all tests
	$(CARGO) fetch --locked # the licences of packages for other systems are read too
	$(CARGO) test --workspace --locked -- --show-output
	$(MAKE) interleavings

# A build of its own: the locks of the model checker only work under it.
interleavings: ## Run the engine's threads in thousands of orders under a model checker
	RUSTFLAGS="--cfg shuttle" SHUTTLE_SILENCE_WARNINGS=1 $(CARGO) test -p tidemark-qcow2 --locked \
	  --target-dir target/shuttle --test interleavings -- --show-output

test-full: install-test-tools ## The same with long property tests and sweeps (about half an hour)
	TIDEMARK_CASES=2000 PROPTEST_CASES=4000 $(CARGO) test --workspace --locked --release
	TIDEMARK_CASES=100000 $(MAKE) interleavings

# qemu-utils holds qemu-img, qemu-io, qemu-nbd and qemu-storage-daemon; libnbd-bin nbdinfo and
# nbdcopy; python3-libnbd nbdsh; libvirt-clients virsh, and with it the schemas.
TEST_TOOLS = qemu-img qemu-io qemu-nbd qemu-storage-daemon nbdinfo nbdcopy nbdsh fio virsh xmllint
TEST_PACKAGES = qemu-utils libnbd-bin python3-libnbd fio libvirt-clients libxml2-utils
install-test-tools:
	@[ -n "$$TIDEMARK_NO_QEMU" ] || for tool in $(TEST_TOOLS); do \
	  command -v $$tool >/dev/null && continue; \
	  sudo=$$([ "$$(id -u)" = 0 ] || echo sudo); \
	  $$sudo apt-get update && \
	  $$sudo apt-get install -y --no-install-recommends $(TEST_PACKAGES); exit $$?; done

check: ## Formatting, lints and documentation
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked

bench: ## Run the benchmarks
	$(CARGO) bench -p tidemark-benches

FUZZ_SECONDS ?= 60
FUZZ_TARGETS = header directory table chain open operations damage repair nbd
fuzz: ## Run every fuzz target for FUZZ_SECONDS (nightly and cargo-fuzz)
	for target in $(FUZZ_TARGETS); do \
	  $(CARGO) +nightly fuzz run --features libfuzzer $$target -- \
	    -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -timeout=10 -verbosity=0 || exit 1; done
