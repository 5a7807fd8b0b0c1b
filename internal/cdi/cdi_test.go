package cdi

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestYAML(t *testing.T) {
	for in, want := range map[string]string{
		"a: 1\nb: x y # comment\nc:\n  - 1\n  - two\nd:\n- x\n- y: 1\n  z: 2\n-\n  - deep\n":       `{"a":1,"b":"x y","c":[1,"two"],"d":["x",{"y":1,"z":2},["deep"]]}`,
		"---\nkey: 'it''s'\n\"q: k\": \"a\\tb\"\nempty:\nnil: ~\nt: true\n":                        `{"empty":null,"key":"it's","nil":null,"q: k":"a\tb","t":true}`,
		"a: [1, 'x, y', [z], {k: v, n: 0x10}]\nb: {}\nc: [\n  1,\n  2 ]\n":                         `{"a":[1,"x, y",["z"],{"k":"v","n":16}],"b":{},"c":[1,2]}`,
		"mode: 0666\nother: 0o17\nv: 0.5\nver: 0.5.0\nneg: -3\nlink: lib.so.1::/usr/lib/x\nh: a#b": `{"h":"a#b","link":"lib.so.1::/usr/lib/x","mode":438,"neg":-3,"other":15,"v":0.5,"ver":"0.5.0"}`,
		"- a\n- b\n":                       `["a","b"]`,
		"- - 1\n  - 2\n- - 3\n":            `[[1,2],[3]]`,
		"{\"json\": [1, {\"a\": null}]}\n": `{"json":[1,{"a":null}]}`,
		"a:\n  b:\n    c: d\n  e: f\n":     `{"a":{"b":{"c":"d"},"e":"f"}}`,
		"a: # nothing here\n  b: 1\n":      `{"a":{"b":1}}`,
		"plain":                            `"plain"`,
		"a: \"# no comment\"\n":            `{"a":"# no comment"}`,
	} {
		v, err := parseYAML([]byte(in))
		got, jerr := json.Marshal(v)
		if err != nil || jerr != nil || string(got) != want {
			t.Errorf("%q:\ngot  %s, %v\nwant %s", in, got, err, want)
		}
	}
	for in, want := range map[string]string{
		"":                              "it is empty",
		"a: &x 1":                       "line 1: &: this form of YAML is not supported",
		"a: |\n  text":                  "line 1: |: this form",
		"a: 1\na: 2":                    `line 2: "a" is there twice`,
		"a: 1\n  b: 2":                  "line 2: unexpected indentation",
		"a:\n\t- b":                     "line 2: a tab can't indent",
		"a: [1, 2":                      "a bracket is not closed",
		"a: 'x":                         "a quote is not closed",
		"a: 1\n- b":                     "line 2: unexpected indentation",
		"a: 1\n---\nb: 2":               `line 2: expected "key: value"`,
		"a: [1 2] x":                    `unexpected "x"`,
		strings.Repeat("[", 100):        "not closed",
		strings.Repeat("- ", 100) + "x": "too deep",
		strings.Repeat("[", 100) + strings.Repeat("]", 100): "too deep",
	} {
		v, err := parseYAML([]byte(in))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, %v, want %q", in, v, err, want)
		}
	}
}

const nvidia = `---
cdiVersion: 0.5.0
containerEdits:
  deviceNodes:
  - path: /dev/nvidiactl
  env:
  - NVIDIA_VISIBLE_DEVICES=void
  hooks:
  - args:
    - nvidia-cdi-hook
    - create-symlinks
    - --link
    - libcuda.so.1::/usr/lib/libcuda.so
    hookName: createContainer
    path: /usr/bin/nvidia-cdi-hook
  mounts:
  - containerPath: /usr/bin/nvidia-smi
    hostPath: /usr/bin/nvidia-smi
    options:
    - ro
    - nosuid
    - bind
devices:
- containerEdits:
    deviceNodes:
    - path: /dev/nvidia0
      permissions: rw
      fileMode: 0600
  name: "0"
- containerEdits:
    env: [ALL=1]
  name: all
kind: nvidia.com/gpu
`

func write(t *testing.T, dir, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestResolve(t *testing.T) {
	etc, run := t.TempDir(), t.TempDir()
	write(t, etc, "nvidia.yaml", nvidia)
	write(t, etc, "old.json", `{"cdiVersion":"0.3.0","kind":"example.com/x","devices":[{"name":"a","containerEdits":{"env":["FROM=etc"]}}]}`)
	write(t, run, "new.json", `{"cdiVersion":"1.1.0","kind":"example.com/x","devices":[{"name":"a","containerEdits":{"env":["FROM=run"]}}]}`)
	write(t, run, "twice.json", `{"cdiVersion":"0.3.0","kind":"example.com/y","devices":[{"name":"a","containerEdits":{}}]}`)
	write(t, run, "twice2.json", `{"cdiVersion":"0.3.0","kind":"example.com/y","devices":[{"name":"a","containerEdits":{}},
		{"name":"net","containerEdits":{"netDevices":[{"hostInterfaceName":"x","name":"y"}]}},
		{"name":"hook","containerEdits":{"hooks":[{"hookName":"poststop","path":"/x"}]}}]}`)
	write(t, run, "broken.yaml", "cdiVersion: [")
	write(t, run, "notes.txt", "nothing of ours")
	r, err := Load([]string{filepath.Join(etc, "missing"), etc, run})
	if err != nil {
		t.Fatal(err)
	}
	e, err := r.Resolve([]string{"nvidia.com/gpu=0", "nvidia.com/gpu=0", "nvidia.com/gpu=all", "example.com/x=a"})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(e.Env, " "); got != "NVIDIA_VISIBLE_DEVICES=void ALL=1 FROM=run" {
		t.Errorf("env %s", got)
	}
	if len(e.DeviceNodes) != 2 || e.DeviceNodes[1].Path != "/dev/nvidia0" || *e.DeviceNodes[1].FileMode != 0o600 || len(e.Mounts) != 1 || len(e.Hooks) != 1 {
		t.Errorf("%+v", e)
	}
	if !r.HasKind("nvidia.com/gpu") || r.HasKind("nvidia.com/gp") {
		t.Error("kinds")
	}
	for name, want := range map[string]string{
		"example.com/y=a":    "is in several files of",
		"example.com/y=net":  "moves network devices",
		"example.com/y=hook": "hook /x is of kind poststop",
		"nvidia.com/gpu=9":   "broken.yaml: line 1: a bracket is not closed",
	} {
		if _, err := r.Resolve([]string{name}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
}

func TestBadSpecs(t *testing.T) {
	const ok = `"cdiVersion":"0.5.0","kind":"a.com/b"`
	dev := func(edits string) string {
		return `{` + ok + `,"devices":[{"name":"x","containerEdits":` + edits + `}]}`
	}
	for in, want := range map[string]string{
		`{"kind":"a.com/b"}`:                                       "version \"\"",
		`{"cdiVersion":"2.0.0","kind":"a.com/b"}`:                  "version \"2.0.0\"",
		`{"cdiVersion":"0.5.0","kind":"a.com"}`:                    "not of the form vendor/class",
		`{` + ok + `}`:                                             "no devices",
		`{` + ok + `,"devices":[{"name":"-"}]}`:                    `device name "-"`,
		`{` + ok + `,"devices":[{"name":"x"},{"name":"x"}]}`:       "there twice",
		`{` + ok + `,"colour":1}`:                                  "unknown field",
		dev(`{}`) + "x":                                            "behind its end",
		dev(`{"env":["=x"]}`):                                      "invalid environment variable",
		dev(`{"env":["A"]}`):                                       "invalid environment variable",
		dev(`{"deviceNodes":[{"path":"dev"}]}`):                    "must be absolute",
		dev(`{"deviceNodes":[{"path":"/dev","type":"z"}]}`):        "none of b, c, u, p",
		dev(`{"deviceNodes":[{"path":"/dev","permissions":"x"}]}`): "not of r, w, m",
		dev(`{"mounts":[{"containerPath":"/x"}]}`):                 "needs a path of the host",
		dev(`{"hooks":[{"path":"x"}]}`):                            "must be absolute",
	} {
		if _, err := parseSpec([]byte(in), true); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
	}
}

func TestIsName(t *testing.T) {
	for s, want := range map[string]bool{
		"nvidia.com/gpu=0": true, "a/b=c": true, "v.x/c_d=1:2.3": true, "vendor.com/class=all": true,
		"/dev/null": false, "vendor.com/class": false, "=x": false, "/x=y": false, "9v/c=x": false, "v/c=": false, "v/c=-x": false, "v/c/d=x": false, "v-/c=x": false,
	} {
		if IsName(s) != want {
			t.Errorf("IsName(%q) is %v", s, !want)
		}
	}
}

func FuzzSpec(f *testing.F) {
	f.Add([]byte(nvidia))
	f.Add([]byte("a: [1, {b: 'c'}]\n- x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := parseYAML(b)
		if err != nil {
			return
		}
		if _, err := json.Marshal(v); err != nil {
			t.Errorf("%q: %v", b, err)
		}
		if s, err := parseSpec(b, false); err == nil && (s.Kind == "" || len(s.Devices) == 0) {
			t.Errorf("%q is a spec without devices", b)
		}
	})
}
