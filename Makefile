# conex: build, demo, test, bench, images, lint, install, uninstall, clean

GO          ?= go
PREFIX      ?= /usr/local
DESTDIR     ?=
CACHE       ?= $(CURDIR)/.cache
IMAGES      ?= $(or $(CONEX_IMAGES_CACHE),$(CACHE)/images)
# The nearest tag; without one the program's own default. The commit comes from the Go toolchain (-buildvcs).
VERSION     ?= $(shell git describe --tags --dirty 2>/dev/null)
LDFLAGS     := -s -w $(if $(VERSION),-X conex/internal/cli.Version=$(VERSION))
# conex and conex-runtime begin before Go does (internal/linux/slack, internal/ocicli/shield), where that is written.
ENTRIES     := $(if $(filter amd64 arm64,$(shell $(GO) env GOARCH)),conex:conexEntry conex-runtime:conexRuntimeEntry)
STATICCHECK ?= honnef.co/go/tools/cmd/staticcheck@v0.8.2
TEST_FLAGS  ?=

export CGO_ENABLED = 0

.PHONY: all build demo deps test guest images bench lint install install-docker-link uninstall clean help

all: build

help:
	@echo "build    bin/conex, bin/conex-explore, bin/conex-runtime"
	@echo "demo     build an image and run it, in under a minute (root)"
	@echo "test     everything: linters, unit tests, scenarios on the real kernel (root)"
	@echo "guest    the kernel tests in a virtual machine with cgroup v2 and an older kernel (root, qemu)"
	@echo "bench    conex beside docker and podman (root; BENCH='-only run-none -n 20')"
	@echo "images   base images without a registry, cached in $(IMAGES) (root)"
	@echo "lint     gofmt, vet, staticcheck, import floors"
	@echo "install  PREFIX=$(PREFIX): the binaries and a unit that starts containers at boot"
	@echo "install-docker-link   the name docker for conex, beside it"
	@echo "uninstall, clean"

# The linker writes its output through a mapping, a page at a time; a copy lies in the page cache in larger pieces, and starts a third faster.
build:
	@for b in conex conex-explore conex-runtime; do \
		entry=; for e in $(ENTRIES); do [ $${e%%:*} != $$b ] || entry="-E $${e#*:}"; done; \
		$(GO) build -trimpath -buildvcs=auto -ldflags "$(LDFLAGS) $$entry" -o bin/.$$b ./cmd/$$b && cp bin/.$$b bin/.$$b.copy && mv bin/.$$b.copy bin/$$b && rm bin/.$$b || exit 1; \
	done

demo: build
	@sh images/need +busybox-static curl
	@sh samples/demo bin/conex

# What tests and images need beyond Go, from Debian's packages, and only what is missing.
deps:
	@sh images/need +busybox-static mmdebstrap fsck.erofs:erofs-utils nft:nftables ip:iproute2 curl flock:util-linux docker-registry ps:procps git skopeo umoci podman runc gcc:gcc +libc6-dev

# No cached results: they know nothing of the kernel, nor of the binary that the scenarios build.
test: deps build lint images
	@mkdir -p $(CACHE)
	@$(GO) run ./test/leaks save $(CACHE)/leaks
	CONEX_IMAGES_CACHE='$(IMAGES)' $(GO) test -count=1 -timeout 18m $(TEST_FLAGS) ./...
	@$(GO) run ./test/leaks check $(CACHE)/leaks

images: build
	@sh images/need +busybox-static mmdebstrap flock:util-linux curl
	@images/make -o '$(IMAGES)' -c bin/conex

# The kernel's side under Debian's own kernel in a virtual machine: cgroup v2 alone, and none of the newest mount features.
guest:
	test/guest/run

bench: build
	$(GO) run ./bench -conex bin/conex $(BENCH)

lint:
	@out=$$(gofmt -l cmd internal test images bench samples); if [ -n "$$out" ]; then echo "gofmt -w these:"; echo "$$out"; exit 1; fi
	$(GO) vet ./...
	$(GO) test ./internal/arch/...
	.ci/staticcheck $(STATICCHECK)

install: build
	install -D -m 0755 bin/conex $(DESTDIR)$(PREFIX)/bin/conex
	install -D -m 0755 bin/conex-explore $(DESTDIR)$(PREFIX)/bin/conex-explore
	install -D -m 0755 bin/conex-runtime $(DESTDIR)$(PREFIX)/bin/conex-runtime
	install -d $(DESTDIR)/etc/systemd/system
	sed 's|@PREFIX@|$(PREFIX)|' docs/conex-reconcile.service >$(DESTDIR)/etc/systemd/system/conex-reconcile.service
	@$(call completions,conex)
	@echo "at boot: systemctl enable conex-reconcile; under the name docker: make install-docker-link"

install-docker-link:
	@if [ -e $(DESTDIR)$(PREFIX)/bin/docker ] && [ "$$(readlink $(DESTDIR)$(PREFIX)/bin/docker)" != conex ]; then \
		echo "$(DESTDIR)$(PREFIX)/bin/docker is something else; left alone"; exit 1; fi
	ln -sfn conex $(DESTDIR)$(PREFIX)/bin/docker
	@$(call completions,docker)

# What makes bash, zsh and fish complete a command's name, which may be a link to conex.
define completions
for f in bash-completion/completions/$(1) zsh/site-functions/_$(1) fish/vendor_completions.d/$(1).fish; do \
	install -d $(DESTDIR)$(PREFIX)/share/$${f%/*} && $(DESTDIR)$(PREFIX)/bin/$(1) completion $${f%%[-/]*} >$(DESTDIR)$(PREFIX)/share/$$f || exit 1; \
done
endef
completed = $(addprefix $(DESTDIR)$(PREFIX)/share/,bash-completion/completions/$(1) zsh/site-functions/_$(1) fish/vendor_completions.d/$(1).fish)

# Data stays: README.md says how to remove that too.
uninstall:
	@if [ "$$(readlink $(DESTDIR)$(PREFIX)/bin/docker)" = conex ]; then \
		rm -f $(DESTDIR)$(PREFIX)/bin/docker $(call completed,docker); fi
	rm -f $(call completed,conex) $(DESTDIR)$(PREFIX)/bin/conex $(DESTDIR)$(PREFIX)/bin/conex-explore $(DESTDIR)$(PREFIX)/bin/conex-runtime $(DESTDIR)/etc/systemd/system/conex-reconcile.service

clean:
	rm -rf bin $(CACHE)
