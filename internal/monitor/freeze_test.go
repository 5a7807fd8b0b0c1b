package monitor_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"conex/internal/control"
	"conex/internal/engine"
)

// freeze stops a container's processes, as a commit does.
func (w *world) freeze(id string) *control.Frozen {
	w.t.Helper()
	f, err := control.NewClient(filepath.Join(w.State(), "c", id, "sock")).Freeze(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return f
}

// frozen asks the kernel whether a container's first process stands still, and compares what conex says.
func (w *world) frozen(id string) bool {
	w.t.Helper()
	d, err := w.InspectContainer(w.t.Context(), id, false)
	if err != nil {
		w.t.Fatal(err)
	}
	list, err := w.ListContainers(w.t.Context(), engine.ListRequest{})
	if err != nil || len(list) != 1 {
		w.t.Fatalf("%v %v", list, err)
	}
	said := d.State.Paused
	if (d.State.Status == "paused") != said || strings.HasSuffix(list[0].Status, "(Paused)") != said || !d.State.Running {
		w.t.Errorf("inspect says %s, paused %v, and ps %q", d.State.Status, said, list[0].Status)
	}
	return said
}

// paused is frozen without the comparison, for moments at which the answer may change between two questions.
func (w *world) paused(id string) bool {
	w.t.Helper()
	d, err := w.InspectContainer(w.t.Context(), id, false)
	if err != nil {
		w.t.Fatal(err)
	}
	return d.State.Paused
}

func counter() engine.RunRequest {
	return request("sh", "-c", "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.01; done")
}

// count reads how far the counter is, from outside.
func (w *world) count(id string) string {
	w.t.Helper()
	b, err := os.ReadFile(w.Containers().Dir(id, "upper", "count"))
	if err != nil && !os.IsNotExist(err) {
		w.t.Fatal(err)
	}
	return string(b)
}

// moves waits until the counter has moved on.
func (w *world) moves(id string) {
	w.t.Helper()
	first := ""
	w.eventually("it moves on", func() bool {
		c := w.count(id)
		if first == "" {
			first = c
		}
		return c != "" && c != first
	})
}

func TestFreeze(t *testing.T) {
	w := newWorld(t)
	id := w.detached(counter())
	w.moves(id)
	a, b := w.freeze(id), w.freeze(id)
	if !w.frozen(id) {
		t.Error("not paused")
	}
	before := w.count(id)
	// An exec waits for its turn instead of getting stuck in there.
	done := make(chan error)
	go func() {
		_, err := w.Exec(t.Context(), engine.ExecRequest{Container: id, Cmd: []string{"touch", "/touched"}})
		done <- err
	}()
	if err := w.Kill(t.Context(), id, "USR1"); err != nil || !w.frozen(id) {
		t.Error("a signal that is not meant to end it lets it go")
	}
	if err := a.Thaw(); err != nil {
		t.Error(err)
	}
	if !w.frozen(id) {
		t.Error("the first of two let it go")
	}
	if after := w.count(id); after != before {
		t.Errorf("it went on from %s to %s", before, after)
	}
	select {
	case err := <-done:
		t.Errorf("exec in a frozen container: %v", err)
	default:
	}
	if err := b.Thaw(); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestFreezeEnds lets go of a frozen container in every other way.
func TestFreezeEnds(t *testing.T) {
	force := engine.RemoveRequest{Force: true}
	for name, end := range map[string]func(w *world, id string) error{
		"stop": func(w *world, id string) error { return w.Stop(w.t.Context(), id, engine.StopRequest{}) },
		"kill": func(w *world, id string) error {
			err := w.Kill(w.t.Context(), id, "")
			_, werr := w.Wait(w.t.Context(), id)
			return errors.Join(err, werr)
		},
		"rm -f": func(w *world, id string) error {
			req := force
			req.Container = id
			return w.RemoveContainer(w.t.Context(), req)
		},
		"kill from outside": func(w *world, id string) error {
			d, err := w.InspectContainer(w.t.Context(), id, false)
			if err == nil {
				err = syscall.Kill(d.State.Pid, syscall.SIGKILL)
			}
			_, werr := w.Wait(w.t.Context(), id)
			return errors.Join(err, werr)
		},
		"death of the monitor": func(w *world, id string) error {
			st, err := w.Containers().State(id)
			if err == nil {
				err = syscall.Kill(st.Monitor, syscall.SIGKILL)
			}
			if err == nil {
				w.eventually("its process is dead", func() bool { return w.Settle(w.t.Context()) == nil && !alive(st.Pid) })
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			r := counter()
			one := 1
			r.Config.StopTimeout = &one // the shell does not catch its stop signal
			id := w.detached(r)
			w.moves(id)
			f := w.freeze(id)
			if err := end(w, id); err != nil {
				t.Error(err)
			}
			if err := f.Thaw(); !errors.Is(err, control.ErrThawed) {
				t.Errorf("thaw afterwards: %v", err)
			}
		})
	}
}

func alive(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}

// TestFreezeDropped leaves the connection without a word, as kill -9 does.
func TestFreezeDropped(t *testing.T) {
	w := newWorld(t)
	id := w.detached(counter())
	w.moves(id)
	for range 20 {
		var conn net.Conn
		err := control.ShortPath(filepath.Join(w.State(), "c", id, "sock"), func(path string) (err error) {
			conn, err = net.Dial("unix", path)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, "POST /freeze HTTP/1.1\r\nHost: conex\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.Contains(line, "101") {
			t.Fatalf("%q %v", line, err)
		}
		if !w.frozen(id) {
			t.Error("not paused")
		}
		conn.Close()
		w.eventually("it is thawed", func() bool { return !w.paused(id) })
	}
	w.moves(id)
}
