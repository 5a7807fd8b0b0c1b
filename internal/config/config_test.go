package config

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func write(t *testing.T, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLoad(t *testing.T) {
	c, err := Load(filepath.Join(t.TempDir(), "none"))
	if err != nil || !reflect.DeepEqual(c, &Config{Root: DefaultRoot, State: DefaultState, KeepBlobs: KeepAuto, Debug: Debug{Image: DefaultToolbox}}) {
		t.Fatalf("defaults: %+v, %v", c, err)
	}
	c, err = Load(write(t, `
root = "/data"
storage-driver = "dir"
dns = ["9.9.9.9", "::1"]
dns-domains = {"corp.example" = ["10.0.0.1", "[fd00::1]:5353"], "lan" = []}
[registry."docker.io"]
mirrors = ["http://127.0.0.1:5000", "https://mirror.example.com/hub"]
[registry."reg.lan:5000"]
plain-http = true
[log]
driver = "json-file"
options = {max-size = "10m"}
`))
	want := &Config{
		Root: "/data", State: DefaultState, StorageDriver: "dir", KeepBlobs: KeepAuto, Debug: Debug{Image: DefaultToolbox}, DNS: []string{"9.9.9.9", "::1"},
		DNSDomains: map[string][]string{"corp.example": {"10.0.0.1", "[fd00::1]:5353"}, "lan": {}},
		Registry: map[string]Registry{
			"docker.io":    {Mirrors: []string{"http://127.0.0.1:5000", "https://mirror.example.com/hub"}},
			"reg.lan:5000": {PlainHTTP: true},
		},
		Log: Log{"json-file", map[string]string{"max-size": "10m"}},
	}
	if err != nil || !reflect.DeepEqual(c, want) {
		t.Fatalf("got %+v, %v", c, err)
	}
}

func TestErrorsNameThePlace(t *testing.T) {
	for text, want := range map[string]string{
		"\nrooot = \"/x\"\n":                               `:2: unknown key "rooot"`,
		"[registry.\"a.b\"]\nmirror = []\n":                `:2: unknown key "registry.a.b.mirror"`,
		"root = 1\n":                                       ":1:",
		"root = \"/x\"\nroot = \"/y\"\n":                   ":2:",
		"root =":                                           ":1:",
		"root = \"x\"":                                     `root: "x" is not an absolute path`,
		"storage-driver = \"zfs\"":                         `storage-driver: "zfs" is none of`,
		"\ncgroup-driver = \"v2\"":                         `:2: cgroup-driver: "v2" is none of`,
		"publish-policy = \"open\"":                        `publish-policy: "open" is none of host, docker`,
		"keep-blobs = \"maybe\"":                           `keep-blobs: "maybe" is none of`,
		"[gc]\nbudget = \"a lot\"\n":                       `:2:`,
		"[build]\n\nmax-parallelism = -1\n":                `:3: build.max-parallelism: -1 is negative`,
		"[gc]\nbudgets = \"1GB\"\n":                        `:2: unknown key "gc.budgets"`,
		"dns = [\"dns.example.com\"]":                      "dns: ",
		"[registry.\"a.b\"]\nmirrors=[\"a.b:5000\"]\n":     "is not of the form http(s)://host",
		"[registry.\"a.b\"]\nmirrors=[\"ftp://a.b/\"]\n":   "is not of the form http(s)://host",
		"[registry.\"a.b\"]\nmirrors=[\"http://a.b?x\"]\n": "is not of the form http(s)://host",
		"root = \"/r\"\n\n[registry.\"a.b\"]\nplain-http=true\nmirrors=[\n\"x\"]\n": ":5: registry.\"a.b\".mirrors: ",
		"\nregistry.\"a.b\".mirrors=[\"x\"]\n":                                      ":2: registry.\"a.b\".mirrors: ",
		"\n\nregistry = {\"a.b\" = {mirrors=[\"x\"]}}\n":                            ":3: registry.\"a.b\".mirrors: ",
		"[registry.\"*\"]\nplain-http=true\n":                                       ":2: registry.\"*\".plain-http: ",
		"[registry.\"a.b/c\"]\nplain-http=true\n":                                   "is not a registry's name",
		"[registry.\"*.b\"]\nplain-http=true\n":                                     "is not a registry's name",
		"\ncert-dirs = [\"certs\"]":                                                 ":2: cert-dirs: ",
		"[dns-domains]\n\n\"corp.example\" = [\"ns.corp.example\"]":                 `:3: dns-domains."corp.example": "ns.corp.example" is not an IP address with or without a port`,
		"[dns-domains]\n\"*.lan\" = [\"::1\"]":                                      `:2: dns-domains."*.lan": is not a domain`,
		"\n\n\ndns = [\"dns.example.com\"]":                                         ":4: dns: ",
	} {
		p := write(t, text)
		_, err := Load(p)
		if err == nil || !strings.HasPrefix(err.Error(), p) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, want ...%s", text, err, want)
		}
	}
}

func TestPath(t *testing.T) {
	t.Setenv("CONEX_CONFIG", "")
	if Path() != DefaultPath {
		t.Error(Path())
	}
	t.Setenv("CONEX_CONFIG", "/x.toml")
	if Path() != "/x.toml" {
		t.Error(Path())
	}
}

func TestAmount(t *testing.T) {
	const total = 1000e9
	for text, want := range map[string]int64{
		"10%": 100e9, "20GB": 20e9, "10%, 20GB": 20e9, "1%,20GB": 10e9, "1GiB": 1 << 30, "1.5g": 15e8, "512": 512, "4KiB": 4096, "0": 0, "0%": 0, "100%": 1000e9,
	} {
		var a Amount
		if err := a.UnmarshalText([]byte(text)); err != nil || a.Of(total) != want {
			t.Errorf("%s: %d, %v; want %d", text, a.Of(total), err, want)
		}
	}
	for _, text := range []string{"", "x", "-1GB", "101%", "NaN%", "1%,2%", "1GB,2GB", "1GB,2%,3", "9999999TB", "1XB", "1ib", "inf"} {
		var a Amount
		if err := a.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q: %d", text, a.Of(total))
		}
	}
	c, err := Load(write(t, "keep-blobs = \"never\"\n[gc]\nauto = false\nbudget = \"5%\"\nmin-free = \"0\"\n"))
	if err != nil || c.KeepBlobs != KeepNever || c.GC.On() {
		t.Fatalf("%+v, %v", c, err)
	}
	if b, m := c.GC.Limits(total); b != 50e9 || m != 0 {
		t.Errorf("limits %d, %d", b, m)
	}
	if b, m := (GC{}).Limits(50e9); b != 5e9 || m != 1e9 {
		t.Errorf("default limits of 50 GB: %d, %d", b, m)
	}
}
