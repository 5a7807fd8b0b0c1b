package monitor_test

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conex/internal/engine"

	apic "github.com/moby/moby/api/types/container"
	"golang.org/x/sys/unix"
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

// TestFullDisk ends containers while the disk has no room for the record of it: the end is known all the same, and written down
// when there is room again.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	w := newWorldAt(t, filepath.Join(dir, "root"))
	ended, killed := w.detached(request("sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done")), w.detached(request("sleep", "1000"))
	w.eventually("not up", func() bool {
		var b strings.Builder
		err := w.Logs(t.Context(), engine.LogsRequest{Container: ended, Tail: -1, Stdout: &b})
		return err == nil && b.String() != ""
	})
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	if _, err := io.Copy(fill, zero); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := w.Create(t.Context(), request("true").CreateRequest); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("create: %v", err)
	}
	if err := w.Stop(t.Context(), ended, engine.StopRequest{}); err != nil {
		t.Error(err)
	}
	if err := unix.Kill(w.state(killed).Monitor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	w.eventually("the killed one runs", func() bool {
		code, err := w.Wait(t.Context(), killed)
		return err == nil && code == 137
	})
	check := func() {
		t.Helper()
		for id, want := range map[string]int{ended: 7, killed: 137} {
			c, err := w.InspectContainer(t.Context(), id, false)
			if err != nil || c.State.Status != apic.StateExited || c.State.ExitCode != want {
				t.Errorf("%+v %v, want %d", c.State, err, want)
			}
		}
		if list, err := w.ListContainers(t.Context(), engine.ListRequest{All: true}); err != nil || len(list) != 2 {
			t.Errorf("%+v %v", list, err)
		}
	}
	check()
	if err := fill.Truncate(0); err != nil {
		t.Fatal(err)
	}
	w.eventually("the monitor holds its lock", func() bool {
		check()
		x, err := w.Containers().Exit(ended)
		return err == nil && x != nil && x.Code == 7
	})
	if x, err := w.Containers().Exit(killed); err != nil || x == nil || x.Code != 137 {
		t.Errorf("%+v %v", x, err)
	}
}

// TestMountOfTheWrongKind says what is wrong with a folder that is mounted onto a file.
func TestMountOfTheWrongKind(t *testing.T) {
	w := newWorld(t)
	r := request("true")
	r.HostConfig.Binds = []string{t.TempDir() + ":/etc/passwd"}
	if _, _, _, err := w.run(r); err == nil || !strings.HasSuffix(err.Error(), "is it a folder mounted onto a file, or a file onto a folder?") {
		t.Errorf("got %v", err)
	}
}
