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
	if err != nil || !reflect.DeepEqual(c, &Config{Root: DefaultRoot, State: DefaultState}) {
		t.Fatalf("defaults: %+v, %v", c, err)
	}
	c, err = Load(write(t, `
root = "/data"
storage-driver = "dir"
dns = ["9.9.9.9", "::1"]
[registry."docker.io"]
mirrors = ["http://127.0.0.1:5000", "https://mirror.example.com/hub"]
[registry."reg.lan:5000"]
plain-http = true
[log]
driver = "json-file"
options = {max-size = "10m"}
`))
	want := &Config{
		Root: "/data", State: DefaultState, StorageDriver: "dir", DNS: []string{"9.9.9.9", "::1"},
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
		"dns = [\"dns.example.com\"]":                      "dns: ",
		"[registry.\"a.b\"]\nmirrors=[\"a.b:5000\"]\n":     "is not of the form http(s)://host",
		"[registry.\"a.b\"]\nmirrors=[\"ftp://a.b/\"]\n":   "is not of the form http(s)://host",
		"[registry.\"a.b\"]\nmirrors=[\"http://a.b?x\"]\n": "is not of the form http(s)://host",
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
