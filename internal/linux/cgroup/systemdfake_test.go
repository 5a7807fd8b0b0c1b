package cgroup

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// fakeSystemd answers on a socket as systemd does, and does to the cgroups what systemd would: where systemd is not process 1, it is how
// far the driver can be tried. The bytes are made by hand here, so that nothing is read by what wrote it.
type fakeSystemd struct {
	t     *testing.T
	roots []string

	mu    sync.Mutex
	calls []string
	// units are the scopes that there are.
	units map[string]bool
}

// le writes values in little endian, each aligned to its size; a string with its length and its end.
func le(values ...any) []byte {
	var b []byte
	align := func(n int) {
		for len(b)%n != 0 {
			b = append(b, 0)
		}
	}
	for _, v := range values {
		switch v := v.(type) {
		case byte:
			b = append(b, v)
		case uint32:
			align(4)
			b = binary.LittleEndian.AppendUint32(b, v)
		case string:
			align(4)
			b = append(append(binary.LittleEndian.AppendUint32(b, uint32(len(v))), v...), 0)
		case []byte:
			align(8)
			b = append(b, v...)
		}
	}
	return b
}

// frame is a message: kind, header fields, body. A signature of up to four letters is the first field.
func frame(kind byte, signature string, fields, body []byte) []byte {
	sig := append(append([]byte{8, 1, 'g', 0, byte(len(signature))}, signature...), 0)
	all := le(sig, fields)
	head := le(byte('l'), kind, byte(0), byte(1), uint32(len(body)), uint32(1), uint32(len(all)))
	return le(append(head, all...), body)
}

func (f *fakeSystemd) serve(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for _, want := range []string{"\x00AUTH EXTERNAL ", "BEGIN"} {
		line, err := r.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, want) {
			f.t.Errorf("handshake: %q, %v", line, err)
			return
		}
	}
	if _, err := io.WriteString(conn, "OK 0123\r\n"); err != nil {
		f.t.Error(err)
		return
	}
	for {
		var head [16]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return // it hung up
		}
		body, serial, fields := binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[8:]), binary.LittleEndian.Uint32(head[12:])
		rest := make([]byte, (fields+7)/8*8+body)
		if _, err := io.ReadFull(r, rest); err != nil {
			f.t.Error(err)
			return
		}
		answer := f.answer(rest[:fields], rest[uint32(len(rest))-body:], append([]byte{5, 1, 'u', 0}, le(serial)...))
		if _, err := conn.Write(answer); err != nil {
			return
		}
	}
}

func (f *fakeSystemd) answer(fields, body, replyTo []byte) []byte {
	f.mu.Lock()
	defer f.mu.Unlock()
	unit := string(body[4 : 4+binary.LittleEndian.Uint32(body)])
	job := func() []byte {
		removed := le([]byte{2, 1, 's', 0}, systemdManager, []byte{3, 1, 's', 0}, "JobRemoved")
		other := frame(4, "uoss", removed, le(uint32(6), systemdPath+"/job/6", "other.service", "failed"))
		mine := frame(4, "uoss", removed, le(uint32(7), systemdPath+"/job/7", unit, "done"))
		// Signals may come before the answer, and about others.
		return slices.Concat(other, frame(2, "o", replyTo, le(systemdPath+"/job/7")), mine)
	}
	fail := func(name string) []byte {
		return frame(3, "s", le(replyTo, []byte{4, 1, 's', 0}, systemdName+"."+name), le("as systemd would say it"))
	}
	for _, member := range []string{"StartTransientUnit", "SetUnitProperties", "StopUnit", "ResetFailedUnit"} {
		if !bytes.Contains(fields, []byte(member)) {
			continue
		}
		f.calls = append(f.calls, member)
		switch member {
		case "StartTransientUnit":
			if f.units[unit] {
				return fail("UnitExists")
			}
			f.units[unit] = true
			at := bytes.Index(body, []byte("PIDs\x00\x02au\x00")) + len("PIDs\x00\x02au\x00")
			at = (at + 3) / 4 * 4
			pid := binary.LittleEndian.Uint32(body[at+4:])
			for _, root := range f.roots {
				dir := filepath.Join(root, "system.slice", unit)
				if err := mkdir(root, filepath.Join("system.slice", unit), nil); err != nil {
					f.t.Error(err)
				}
				if err := writeFile(filepath.Join(dir, "cgroup.procs"), itoa(int64(pid))); err != nil {
					f.t.Errorf("process %d: %v", pid, err)
				}
			}
			return job()
		case "StopUnit":
			if !f.units[unit] {
				return fail("NoSuchUnit")
			}
			delete(f.units, unit)
			for _, root := range f.roots {
				if err := removeTree(filepath.Join(root, "system.slice", unit)); err != nil {
					f.t.Error(err)
				}
			}
			return job()
		case "ResetFailedUnit":
			return fail("NoSuchUnit")
		default:
			return frame(2, "s", replyTo, le(""))
		}
	}
	f.t.Errorf("unknown call %q", fields)
	return fail("Unknown")
}

func TestSystemdDriver(t *testing.T) {
	mt := needRoot(t)
	f := &fakeSystemd{t: t, units: map[string]bool{}}
	for _, root := range []string{mt.v1[Named], mt.unified} {
		if root != "" {
			f.roots = append(f.roots, root)
		}
	}
	sock := filepath.Join(t.TempDir(), "private")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // ends with the listener
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go f.serve(conn) // ends when the driver hangs up
		}
	}()
	usual := systemdSockets
	systemdSockets = []string{sock}
	t.Cleanup(func() { systemdSockets = usual })

	place, err := ForContainer("fake"+itoa(int64(os.Getpid())), "", true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Prune("system.slice"); err != nil {
			t.Error(err)
		}
	})
	m, err := Open(place)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Create(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(50))}}); err != nil {
		t.Fatal(err)
	}
	p := start(t, m, "wait")
	m.Started()
	if pids, err := m.Pids(); err != nil || !slices.Equal(pids, []int{p.Process.Pid}) {
		t.Errorf("pids %v, %v; want %d alone", pids, err, p.Process.Pid)
	}
	if err := m.Update(&specs.LinuxResources{Pids: &specs.LinuxPids{Limit: ptr(int64(60))}}); err != nil {
		t.Error(err)
	}
	if st, err := m.Stats(); err != nil || mt.v1["pids"] != "" && st.Pids.Limit != 60 {
		t.Errorf("%+v, %v", st, err)
	}
	if err := m.Kill(); err != nil {
		t.Error(err)
	}
	if err := waitFor(p); err == nil {
		t.Error("it was not killed")
	}
	// Another scope of the name is still there, as that of a killed monitor's container: it is ended first.
	if err := m.Delete(); err != nil {
		t.Error(err)
	}
	f.mu.Lock()
	if want := []string{"StartTransientUnit", "SetUnitProperties", "StopUnit", "ResetFailedUnit"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %v, want %v", f.calls, want)
	}
	f.calls, f.units[place.Unit] = nil, true
	f.mu.Unlock()
	if err := m.Create(nil); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	if want := []string{"StartTransientUnit", "StopUnit", "ResetFailedUnit", "StartTransientUnit"}; !slices.Equal(f.calls, want) {
		t.Errorf("calls %v, want %v", f.calls, want)
	}
	f.mu.Unlock()
	// Nothing came of it: the child that stood in is killed with the rest, and reaped.
	if err := errors.Join(m.Kill(), m.Delete()); err != nil {
		t.Error(err)
	}
	for _, root := range mt.roots() {
		if exists(filepath.Join(root, place.Path)) {
			t.Errorf("%s is left", filepath.Join(root, place.Path))
		}
	}
	if _, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); err != unix.ECHILD {
		t.Errorf("children are left: %v", err)
	}
	systemdSockets = []string{sock + "x"}
	if err := m.Create(nil); err == nil || !strings.Contains(err.Error(), "cgroup-driver") {
		t.Errorf("without systemd: %v", err)
	}
}
