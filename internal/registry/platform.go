package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"

	"conex/internal/ocispec"
)

// ErrNoPlatform says that an image is not made for the wanted platform.
var ErrNoPlatform = errors.New("no matching manifest")

// HostPlatform returns the platform that images must be made for to run here.
func HostPlatform() ocispec.Platform {
	return normal(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH})
}

// ParsePlatform reads os[/arch[/variant]], or an architecture alone, as --platform takes it. "" is this machine's.
func ParsePlatform(s string) (ocispec.Platform, error) {
	host := HostPlatform()
	if s == "" {
		return host, nil
	}
	parts := strings.Split(strings.ToLower(s), "/")
	for _, p := range parts {
		if p == "" || strings.Trim(p, "abcdefghijklmnopqrstuvwxyz0123456789._-") != "" {
			return ocispec.Platform{}, fmt.Errorf("%q: invalid platform, want os/arch[/variant]", s)
		}
	}
	switch len(parts) {
	case 1:
		if parts[0] == "linux" {
			return host, nil
		}
		p := normal(ocispec.Platform{OS: "linux", Architecture: parts[0]})
		if !knownArch(p.Architecture) {
			return ocispec.Platform{}, fmt.Errorf("%q: unknown operating system or architecture", s)
		}
		return p, nil
	case 2:
		return normal(ocispec.Platform{OS: parts[0], Architecture: parts[1]}), nil
	case 3:
		return normal(ocispec.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]}), nil
	}
	return ocispec.Platform{}, fmt.Errorf("%q: invalid platform, want os/arch[/variant]", s)
}

func knownArch(a string) bool {
	switch a {
	case "amd64", "arm64", "arm", "386", "ppc64le", "s390x", "riscv64", "loong64", "mips64le", "mips64":
		return true
	}
	return false
}

// KnownPlatform reports whether programs for an operating system and architecture exist.
func KnownPlatform(os, arch string) bool {
	switch os {
	case "linux":
		return knownArch(arch) || arch == "ppc64" || arch == "mips" || arch == "mipsle" || arch == "wasm"
	case "windows", "freebsd":
		return arch == "386" || arch == "amd64" || arch == "arm" || arch == "arm64"
	case "darwin", "netbsd", "openbsd", "plan9", "dragonfly", "solaris", "android", "aix", "js", "wasip1":
		return arch != ""
	}
	return false
}

// normal gives each platform one spelling.
func normal(p ocispec.Platform) ocispec.Platform {
	p.OS, p.Architecture, p.Variant = strings.ToLower(p.OS), strings.ToLower(p.Architecture), strings.ToLower(p.Variant)
	switch p.Architecture {
	case "x86_64", "x86-64":
		p.Architecture = "amd64"
	case "aarch64":
		p.Architecture = "arm64"
	case "i386", "i686":
		p.Architecture = "386"
	case "armhf":
		p.Architecture, p.Variant = "arm", "v7"
	case "armel":
		p.Architecture, p.Variant = "arm", "v6"
	}
	switch {
	case p.Architecture == "amd64" && p.Variant == "v1", p.Architecture == "arm64" && (p.Variant == "v8" || p.Variant == "8"):
		p.Variant = ""
	case p.Architecture == "arm" && p.Variant == "":
		p.Variant = "v7"
	case p.Architecture == "arm" && len(p.Variant) == 1:
		p.Variant = "v" + p.Variant
	}
	return p
}

// FormatPlatform returns os/arch[/variant].
func FormatPlatform(p ocispec.Platform) string {
	s := p.OS + "/" + p.Architecture
	if p.Variant != "" {
		s += "/" + p.Variant
	}
	return s
}

// Fits reports how well an image for have runs where want is asked for: 0 is exactly, more is worse, negative not at all. Of 32 bit
// ARM and amd64 an older variant serves a newer one.
func Fits(want, have ocispec.Platform) int {
	want, have = normal(want), normal(have)
	if want.OS != have.OS || want.Architecture != have.Architecture {
		return -1
	}
	if want.Variant == have.Variant {
		return 0
	}
	if want.Architecture != "arm" && want.Architecture != "amd64" {
		return -1
	}
	w, h := level(want.Variant), level(have.Variant)
	if h < 0 || w < 0 || h > w {
		return -1
	}
	return w - h
}

// level returns the number in a variant, 1 for none, -1 if it isn't of that form.
func level(v string) int {
	if v == "" {
		return 1
	}
	if len(v) == 2 && v[0] == 'v' && v[1] >= '1' && v[1] <= '9' {
		return int(v[1] - '0')
	}
	return -1
}

// Select picks the manifest for a platform from an index. None is ErrNoPlatform, in Docker's words.
func Select(index []byte, want ocispec.Platform) (ocispec.Descriptor, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(index, &idx); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("decode index: %w", err)
	}
	best, bestFit := ocispec.Descriptor{}, -1
	for _, d := range idx.Manifests {
		if d.Platform == nil || d.Annotations["vnd.docker.reference.type"] != "" || IsIndex(d.MediaType) {
			continue // an attestation, or an index in an index, which no tool writes for images
		}
		if fit := Fits(want, *d.Platform); fit >= 0 && (bestFit < 0 || fit < bestFit) {
			best, bestFit = d, fit
		}
	}
	if bestFit < 0 && len(idx.Manifests) == 1 && idx.Manifests[0].Platform == nil && !IsIndex(idx.Manifests[0].MediaType) {
		best, bestFit = idx.Manifests[0], 0 // an index of one, without a word on its platform: its config will tell
	}
	if bestFit < 0 {
		return ocispec.Descriptor{}, fmt.Errorf("%w for %s in the manifest list entries", ErrNoPlatform, FormatPlatform(want))
	}
	return best, checkDescriptor(best)
}
