package test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestThreeTier runs samples/three-tier as its README tells it.
func TestThreeTier(t *testing.T) {
	w := newWorld(t)
	dir := w.copyTree("../samples/three-tier", "three-tier")
	script := func(args ...string) string {
		t.Helper()
		cmd := exec.Command("sh", args...)
		cmd.Dir, cmd.Env = dir, append(w.env, "CONEX="+w.bin, "PORT=8080")
		var out strings.Builder
		cmd.Stdout, cmd.Stderr = &out, &out
		w.start(cmd)
		if err := cmd.Wait(); err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out.String())
		}
		return out.String()
	}
	const visits = "http://127.0.0.1:8080/visits"
	if out := script("up"); !strings.HasSuffix(out, visits+"\n") {
		t.Errorf("up says %q", out)
	}

	// Names resolve, each container's own networks' and no others.
	resolve := func(in, name string) int {
		t.Helper()
		return w.try("exec", in, "getent", "hosts", name).code
	}
	for in, names := range map[string]string{"tier-web": "api tier-api1 tier-api2 tier-api3", "tier-api1": "db tier-db api tier-web", "tier-db": "tier-api1 tier-api2"} {
		for name := range strings.FieldsSeq(names) {
			if code := resolve(in, name); code != 0 {
				t.Errorf("%s does not find %s: exit code %d", in, name, code)
			}
		}
	}
	for _, name := range []string{"db", "tier-db"} {
		if resolve("tier-web", name) == 0 {
			t.Errorf("the web server finds %s", name)
		}
	}

	// The API began when the database was healthy: its first start would have failed, and been counted, before.
	if got := w.conex("inspect", "-f", "{{.RestartCount}} {{.State.Health.Status}}", "tier-api1", "tier-api2", "tier-api3"); got != "0 healthy\n0 healthy\n0 healthy" {
		t.Errorf("restarts and health of the API: %q", got)
	}

	// Three instances share the load.
	by := map[string]int{}
	count := 0.0
	visit := func() {
		t.Helper()
		var v map[string]any
		body, tries := w.getTried(visits)
		if err := json.Unmarshal([]byte(body), &v); err != nil {
			t.Fatalf("%q: %v", body, err)
		}
		by[fmt.Sprint(v["by"])]++
		n, ok := v["visits"].(float64)
		if !ok || n < count+1 || n > count+float64(tries) { // one whose answer came too late may have been counted
			t.Fatalf("after %v visits the answer is %v", count, v)
		}
		count = n
	}
	for deadline := time.Now().Add(60 * time.Second); len(by) < 3 && time.Now().Before(deadline); {
		visit()
	}
	if len(by) != 3 {
		t.Errorf("of %v visits the instances answered %v", count, by)
	}
	for id := range by {
		if got := w.conex("ps", "--filter", "id="+id, "--format", "{{.Names}}"); !strings.HasPrefix(got, "tier-api") {
			t.Errorf("%q answered, which is the container %q", id, got)
		}
	}

	// One less, and nobody notices.
	w.conex("rm", "-f", "tier-api2")
	for range 10 {
		visit()
	}

	// The data outlive every container: up makes all of them anew, down and up the networks too.
	before := w.containers()
	script("up")
	for _, id := range before {
		if w.try("inspect", id).code == 0 {
			t.Errorf("container %.12s outlived up", id)
		}
	}
	visit()
	script("down")
	if got := w.containers(); len(got) != 0 {
		t.Errorf("down left %v", got)
	}
	if got := w.conex("network", "ls", "-q", "--filter", "type=custom"); got != "" {
		t.Errorf("down left the networks %q", got)
	}
	script("up")
	visit()

	script("down", "--data")
	if got := w.conex("volume", "ls", "-q"); got != "" {
		t.Errorf("down --data left the volumes %q", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "secret")); err == nil {
		t.Error("down --data left the password")
	}
}
