package dbus

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestBus talks to a real bus: greeting, a call with an answer, an error, and a signal.
func TestBus(t *testing.T) {
	daemon, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("no dbus-daemon on this machine (package dbus-daemon)")
	}
	sock := filepath.Join(t.TempDir(), "bus")
	cmd := exec.Command(daemon, "--session", "--nofork", "--print-address", "--address=unix:path="+sock)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill() // an error says that it is gone already
		cmd.Wait()
	})
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil { // it listens
		t.Fatal(err)
	}
	c, err := Dial(sock, time.Now().Add(20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const bus, path = "org.freedesktop.DBus", "/org/freedesktop/DBus"
	r, err := c.Call(bus, path, bus, "Hello", nil)
	if err != nil {
		t.Fatal(err)
	}
	if name := r.String(); !strings.HasPrefix(name, ":1.") || r.Err() != nil {
		t.Errorf("our name: %q, %v", name, r.Err())
	}
	// Its signal NameAcquired came before the answer or after it.
	for _, want := range []string{":1.", "org.conex.test"} {
		if want != ":1." {
			body := new(Body).String(want)
			body.signature += "u"
			body.u32(0)
			if _, err := c.Call(bus, path, bus, "RequestName", body); err != nil {
				t.Fatal(err)
			}
		}
		s, err := c.Signal()
		if err != nil {
			t.Fatal(err)
		}
		if s.Member != "NameAcquired" || s.Interface != bus || s.Path != path {
			t.Errorf("signal %+v", s)
		}
		if got := s.Body.String(); !strings.HasPrefix(got, want) || s.Body.Err() != nil {
			t.Errorf("signal about %q, want %q", got, want)
		}
	}
	_, err = c.Call(bus, path, bus, "GetNameOwner", new(Body).String("org.conex.nobody"))
	var e *Error
	if !errors.As(err, &e) || e.Name != "org.freedesktop.DBus.Error.NameHasNoOwner" || !strings.Contains(e.Message, "org.conex.nobody") {
		t.Errorf("no such name: %v", err)
	}
	// A body of every type that properties may have: the bus checks it before it finds that nobody would take it.
	props := new(Body).String("x").Properties([]Property{
		{"s", "text"}, {"b", true}, {"u", uint32(7)}, {"t", ^uint64(0)}, {"as", []string{"one", ""}}, {"au", []uint32{1, 2, 3}}, {"ay", []byte{1}}, {"as", []string(nil)},
	}).NoUnits().Bool(false)
	_, err = c.Call(bus, path, bus, "NoSuchMethod", props)
	if !errors.As(err, &e) || e.Name != "org.freedesktop.DBus.Error.UnknownMethod" {
		t.Errorf("no such method: %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	if _, err := Dial(filepath.Join(t.TempDir(), "none"), time.Now().Add(time.Second)); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no socket: %v", err)
	}
}

// FuzzReadMessage reads whatever there may be as messages and their bodies.
func FuzzReadMessage(f *testing.F) {
	m := message{kind: kindSignal, serial: 3, path: "/a", iface: "a.b", member: "M", signature: "uoss", body: new(Body).String("x").String("y").b}
	f.Add(m.encode())
	f.Add((&message{kind: kindReturn, serial: 1, replyTo: 9}).encode())
	f.Add([]byte("B\x04\x00\x01\xff\xff\xff\xff\x00\x00\x00\x01\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		for {
			m, err := readMessage(r)
			if err != nil {
				return
			}
			d := m.reader()
			for d.Err() == nil {
				if d.Uint32(); len(d.String()) > len(b) {
					t.Fatal("more than there was")
				}
			}
		}
	})
}

// TestEncode reads what is written.
func TestEncode(t *testing.T) {
	in := message{kind: kindError, serial: 7, replyTo: 5, path: "/p", iface: "i.f", member: "Mem", dest: "d.e", errorName: "e.r", signature: "s", body: new(Body).String("why").b}
	out, err := readMessage(bytes.NewReader(in.encode()))
	if err != nil {
		t.Fatal(err)
	}
	if out.serial != 7 || out.replyTo != 5 || out.path != "/p" || out.iface != "i.f" || out.member != "Mem" || out.dest != "d.e" || out.errorName != "e.r" || out.reader().String() != "why" {
		t.Errorf("%+v", out)
	}
	if _, err := readMessage(bytes.NewReader(in.encode()[:40])); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("half a message: %v", err)
	}
}
