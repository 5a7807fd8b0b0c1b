package monitor_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
)

// TestInspectAsScriptsReadIt reads what scripts that were written for Docker read.
func TestInspectAsScriptsReadIt(t *testing.T) {
	w := newWorld(t)
	r := request("sleep", "1000")
	r.HostConfig = &apic.HostConfig{Resources: apic.Resources{Memory: 32 << 20}, CapAdd: []string{"net_admin"}, Binds: []string{"/tmp:/t:ro", "/tmp:/t:ro"}}
	id := w.detached(r)
	c, err := w.InspectContainer(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	n := c.NetworkSettings
	if n.IPAddress == "" || n.IPAddress != n.Networks["bridge"].IPAddress || n.Gateway == "" || n.IPPrefixLen == 0 || n.MacAddress == "" {
		t.Errorf("running: %+v", n)
	}
	h := c.HostConfig
	if h.MemorySwap != 64<<20 || h.ShmSize != 64<<20 || h.IpcMode != "private" || h.CapAdd[0] != "CAP_NET_ADMIN" || len(c.Mounts) != 1 {
		t.Errorf("defaults: %+v %+v", h, c.Mounts)
	}
	b, err := json.Marshal(c)
	if err != nil || strings.Count(string(b), `"NetworkSettings":`) != 1 || !strings.Contains(string(b), `"IPAddress":"`+n.IPAddress) {
		t.Errorf("%s %v", b, err)
	}
	if err := w.Stop(t.Context(), id, engine.StopRequest{Signal: "KILL"}); err != nil {
		t.Fatal(err)
	}
	if c, err = w.InspectContainer(t.Context(), id, false); err != nil || c.NetworkSettings.IPAddress != "" || c.NetworkSettings.Networks["bridge"].IPAddress != "" {
		t.Errorf("stopped: %+v %v", c.NetworkSettings, err)
	}
}

// TestStartErrorsCodes has Docker's two codes of a start that failed: the client's 125 and 128 in the record.
func TestStartErrorsCodes(t *testing.T) {
	w := newWorld(t)
	r := request("true")
	r.Name, r.Config.User = "bad", "nobody-here"
	_, _, _, err := w.run(r)
	var ee *engine.ExitError
	if !errors.As(err, &ee) || ee.Code != 125 {
		t.Errorf("run: %v", err)
	}
	if c, err := w.InspectContainer(t.Context(), "bad", false); err != nil || c.State.ExitCode != 128 || c.State.Status != apic.StateCreated {
		t.Errorf("%+v %v", c.State, err)
	}
	id := w.detached(request("sleep", "1000"))
	code, err := w.Exec(t.Context(), engine.ExecRequest{Container: id, User: "nobody-here", Cmd: []string{"true"}})
	if code != 126 || err == nil || !strings.Contains(err.Error(), "unable to find user nobody-here") {
		t.Errorf("exec: %d %v", code, err)
	}
}

// TestReadOnlyHostsFiles: --read-only covers the generated files, too.
func TestReadOnlyHostsFiles(t *testing.T) {
	w := newWorld(t)
	r := request("sh", "-c", "for f in hosts hostname resolv.conf; do echo x >>/etc/$f && echo wrote $f; done")
	r.HostConfig.ReadonlyRootfs = true
	if out, _, _, err := w.run(r); err != nil || out != "" {
		t.Errorf("%q %v", out, err)
	}
	r = request("sh", "-c", "echo x >>/etc/hosts && echo wrote")
	if out, _, _, err := w.run(r); err != nil || out != "wrote\n" {
		t.Errorf("%q %v", out, err)
	}
}
