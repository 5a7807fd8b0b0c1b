package build

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/ocispec"
)

// What Debian's qemu-user-static registers for arm64.
const arm64Handler = `enabled
interpreter /usr/libexec/qemu-binfmt/aarch64-binfmt-P
flags: POCF
offset 0
magic 7f454c460201010000000000000000000200b700
mask ffffffffffffff00fffffffffffffffffeffffff
`

func TestForeignReason(t *testing.T) {
	arm64, s390x := ocispec.Platform{OS: "linux", Architecture: "arm64"}, ocispec.Platform{OS: "linux", Architecture: "s390x"}
	amd64 := ocispec.Platform{OS: "linux", Architecture: "amd64"}
	for _, c := range []struct {
		name, handler string
		plat          ocispec.Platform
		inImage       bool
		want          string // "" is: it should run
	}{
		{"registered", arm64Handler, arm64, false, ""},
		{"none", "", arm64, false, "no interpreter is registered"},
		{"another's", arm64Handler, s390x, false, "can't run programs of linux/s390x: no interpreter is registered"},
		{"off", strings.Replace(arm64Handler, "enabled", "disabled", 1), arm64, false, "switched off"},
		{"without F", strings.Replace(arm64Handler, "POCF", "POC", 1), arm64, false, "without the flag F"},
		{"without F, in the image", strings.Replace(arm64Handler, "POCF", "POC", 1), arm64, true, ""},
		{"by extension", "enabled\ninterpreter /x\nflags: \nextension .exe\n", arm64, false, "no interpreter is registered"},
		{"unreadable", "enabled\nmagic zz\n", arm64, false, "no interpreter is registered"},
		{"own", "", amd64, false, ""},
		{"own, 32 bits", "", ocispec.Platform{OS: "linux", Architecture: "386"}, false, ""},
		{"unknown", "", ocispec.Platform{OS: "linux", Architecture: "pdp11"}, false, "can't run programs of linux/pdp11"},
	} {
		dir := t.TempDir()
		if c.handler != "" {
			if err := os.WriteFile(filepath.Join(dir, "h"), []byte(c.handler), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got := foreignReason(dir, amd64, c.plat, func(string) bool { return c.inImage })
		if (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if h := elfMachines["s390x"].header(); string(h[:6]) != "\x7fELF\x02\x02" || h[18] != 0 || h[19] != 22 {
		t.Errorf("header of s390x: % x", h)
	}
}
