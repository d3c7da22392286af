# make help says what there is. Only bin/ is written to.

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-builtin-rules
.DELETE_ON_ERROR:

# sudo drops /usr/local/go/bin from PATH, so it is looked for there, too.
GO       ?= $(shell command -v go || echo /usr/local/go/bin/go)
VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
PREFIX   ?= /usr/local
CNI_BIN  ?= /opt/cni/bin
FUZZTIME ?= 30s
# How long make campaign takes; SEED=N repeats what was drawn.
CAMPAIGN ?= 10m
# What make test tests.
PKGS     ?= ./...
# Packages whose tests also run with the race detector in make check.
RACE     ?= ./pkg/... ./internal/... ./swaybar/... ./cmd/ledger-lab

GOFUMPT     := bin/tools/gofumpt-v0.12.0
STATICCHECK := bin/tools/staticcheck-v0.8.2

# The version is set by hand: go's own way fails in a checkout of another user.
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false
STAMP := -ldflags '-s -w -X main.version=$(VERSION)'

PROGRAMS := ./plugins/ipam-ledger ./cmd/ledger ./cmd/ledger-lab
# The CNI reference plugin that the demo's network configuration names first.
BRIDGE   := github.com/containernetworking/plugins/plugins/main/bridge

.PHONY: build demo demo-desktop test e2e-full campaign mutate check bench bench-desktop fuzz install clean help need-go

build: need-go ## the programs, and what the demo needs, into bin/ (the default)
	@mkdir -p bin
	$(BUILD) $(STAMP) -o bin/ $(PROGRAMS)
	$(BUILD) $(STAMP) -o bin/ledger-swaybar ./swaybar
	$(BUILD) -o bin/ $(BRIDGE)

demo: build ## the main job before your eyes; as root with real pods; KEEP=1 leaves it up
	bin/ledger-lab demo $(if $(filter-out 0,$(KEEP)),--keep)

demo-desktop: build ## the state in a bar: on your Sway, or headless with screenshots in a folder it names
	@hack/install-test-deps.sh
	bin/ledger-lab desktop

# With CI=true a test that skips is a test that fails.
test: need-go ## all tests; as root with real network namespaces
	@if [ "$$(id -u)" != 0 ]; then \
	  if [ "$${CI:-}" = true ]; then \
	    echo "make test: with CI=true nothing is skipped, and network namespaces need root: run it as root" >&2; exit 1; \
	  fi; \
	  echo "make test: not root, so without network namespaces; sudo make test runs everything"; \
	fi
	@hack/install-test-deps.sh
	@mkdir -p bin
	@if [ "$${CI:-}" = true ]; then \
	  set -x; $(GO) test -v -timeout 12m $(PKGS) 2>&1 | tee bin/test.log; { set +x; } 2>/dev/null; \
	  if grep -E '^ *--- SKIP' bin/test.log; then echo "make test: with CI=true the tests above must not be skipped" >&2; exit 1; fi; \
	else \
	  set -x; $(GO) test -timeout 12m $(PKGS); \
	fi

e2e-full: need-go ## the end-to-end tests in their larger sizes
	@hack/install-test-deps.sh
	IPAM_LEDGER_FULL=1 $(GO) test -v -timeout 60m ./test/e2e/...

# The program takes the place of make's shell, so that an interrupt reaches it.
campaign: need-go ## random faults over 20 nodes for CAMPAIGN (10m); SEED=N repeats the draws
	@mkdir -p bin
	$(BUILD) -o bin/campaign ./test/campaign
	exec bin/campaign -for $(CAMPAIGN) $(if $(SEED),-seed $(SEED))

mutate: need-go ## mistakes put into the code, one by one: do tests notice? MUTATEFLAGS='-run ID'
	$(GO) run ./test/mutate $(MUTATEFLAGS)

check: need-go $(GOFUMPT) $(STATICCHECK) ## format, vet, static analysis, arm64, race detector
	@unformatted="$$($(GOFUMPT) -l $$(git ls-files -co --exclude-standard '*.go'))"; \
	if [ -n "$$unformatted" ]; then echo "make check: not formatted, run $(GOFUMPT) -w on:" >&2; echo "$$unformatted" >&2; exit 1; fi
	$(GO) mod verify
	$(GO) vet ./...
	$(STATICCHECK) ./...
	GOOS=linux GOARCH=arm64 CGO_ENABLED=0 $(GO) build ./...
	GOOS=linux GOARCH=arm64 CGO_ENABLED=0 $(GO) vet $(PROGRAMS) ./swaybar
	@command -v $${CC:-gcc} >/dev/null || { echo "make check: the race detector needs a C compiler: apt-get install gcc libc6-dev" >&2; exit 1; }
	CGO_ENABLED=1 $(GO) test -race -timeout 20m $(RACE)

bench: need-go ## what we claim about speed, measured again
	$(GO) run ./bench $(BENCHFLAGS)

bench-desktop: need-go ## what the desktop part costs
	$(GO) run ./bench/desktop

fuzz: need-go ## each fuzz target for FUZZTIME (30s)
	@grep -rE --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' . | sort | while IFS=: read -r file target; do \
	  target="$${target#func }"; echo "$$(dirname "$$file") $$target"; \
	  $(GO) test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$(dirname "$$file")" </dev/null; \
	done

# Each program replaces the old one in one step: a runtime may execute the
# plugin at any moment.
install: build ## ledger and ledger-swaybar into PREFIX/bin, the plugin into CNI_BIN; DESTDIR works
	install -d '$(DESTDIR)$(PREFIX)/bin' '$(DESTDIR)$(CNI_BIN)'
	install -m 755 bin/ledger '$(DESTDIR)$(PREFIX)/bin/.ledger.new'
	mv -f '$(DESTDIR)$(PREFIX)/bin/.ledger.new' '$(DESTDIR)$(PREFIX)/bin/ledger'
	install -m 755 bin/ledger-swaybar '$(DESTDIR)$(PREFIX)/bin/.ledger-swaybar.new'
	mv -f '$(DESTDIR)$(PREFIX)/bin/.ledger-swaybar.new' '$(DESTDIR)$(PREFIX)/bin/ledger-swaybar'
	install -m 755 bin/ipam-ledger '$(DESTDIR)$(CNI_BIN)/.ipam-ledger.new'
	mv -f '$(DESTDIR)$(CNI_BIN)/.ipam-ledger.new' '$(DESTDIR)$(CNI_BIN)/ipam-ledger'

clean: ## remove bin/
	rm -rf bin

help: ## this
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | while IFS= read -r line; do \
	  printf '  make %-13s %s\n' "$${line%%:*}" "$${line##*## }"; \
	done

need-go:
	@found="$$('$(GO)' env GOVERSION 2>/dev/null || true)"; minor="$${found#go1.}"; minor="$${minor%%[!0-9]*}"; \
	if [ "$${minor:-0}" -lt 26 ]; then \
	  echo "make: Go 1.26 or newer is needed, and $${found:-none} was found: unpack one from https://go.dev/dl/ into /usr/local and put /usr/local/go/bin first in PATH." >&2; exit 1; \
	fi

bin/tools/gofumpt-%: | need-go
	GOBIN='$(CURDIR)/bin/tools' $(GO) install mvdan.cc/gofumpt@$*
	mv bin/tools/gofumpt $@

bin/tools/staticcheck-%: | need-go
	GOBIN='$(CURDIR)/bin/tools' $(GO) install honnef.co/go/tools/cmd/staticcheck@$*
	mv bin/tools/staticcheck $@
