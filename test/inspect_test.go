package test

import (
	"encoding/json"
	"os"
	"strings"
	"testing"
)

// TestInspectFields holds the JSON of inspect against Docker's: inspect-docker.txt lists each path in what Docker 20.10's API answers
// for a container of the same flags, and the type there, without what is the storage driver's own and what newer ones have dropped
// (kernel memory, OnBuild). "/" in a key is "~".
func TestInspectFields(t *testing.T) {
	w := newWorld(t)
	w.conex("pull", "-q", "busybox")
	w.conex("run", "-d", "--name", "cmp", "-p", "127.0.0.1:18099:80", "--expose", "90", "-v", "/tmp:/mnt", "--tmpfs", "/t", "--mount", "type=volume,dst=/vol",
		"-e", "A=b", "-l", "x=y", "--ulimit", "nofile=1000:2000", "--health-cmd", "true", "--sysctl", "net.core.somaxconn=9", "--device", "/dev/null:/dev/xx",
		"--add-host", "a:1.1.1.1", "--dns", "9.9.9.9", "--init", "--restart", "on-failure:3", "--log-opt", "max-size=1m", "--log-driver", "json-file",
		"--memory", "64m", "--stop-timeout", "3", "--cap-add", "NET_ADMIN", "--security-opt", "no-new-privileges", "busybox", "sleep", "1000")
	w.conex("exec", "-d", "cmp", "sleep", "1000")
	var found []any
	if err := json.Unmarshal([]byte(w.conex("inspect", "-s", "cmp")), &found); err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	ours := map[string]string{}
	paths("", found[0], ours)
	recorded, err := os.ReadFile("inspect-docker.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(recorded)) {
		path, kind, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			t.Fatalf("line %q", line)
		}
		n++
		switch got := ours[path]; {
		case got == "":
			t.Errorf("%s (%s) is missing", path, kind)
		case got != kind && kind != "null":
			t.Errorf("%s is %s, Docker's is %s", path, got, kind)
		}
	}
	if n < 200 {
		t.Errorf("only %d paths are recorded", n)
	}
}

// paths lists what is in v, by path, with its type.
func paths(at string, v any, out map[string]string) {
	kind := "null"
	switch v := v.(type) {
	case map[string]any:
		kind = "object"
		for k, x := range v {
			paths(at+"/"+strings.ReplaceAll(k, "/", "~"), x, out)
		}
	case []any:
		kind = "list"
		if len(v) > 0 {
			paths(at+"/[]", v[0], out)
		}
	case string:
		kind = "string"
	case bool:
		kind = "bool"
	case float64:
		kind = "number"
	}
	if at != "" {
		out[at] = kind
	}
}
