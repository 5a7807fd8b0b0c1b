package test

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestStreamBesideConnect: containers join and leave networks while others of their networks carry a stream, which loses nothing, and a
// published port, whose host port stays.
func TestStreamBesideConnect(t *testing.T) {
	w := limitsWorld(t)
	w.conex("network", "create", "--subnet", "10.81.0.0/24", "steady")
	w.conex("network", "create", "--subnet", "10.82.0.0/24", "coming")
	// The receiver counts what it gets.
	w.conex("run", "-d", "--name", "receiver", "--network", "name=steady,ip=10.81.0.9", "-p", "127.0.0.1:18080:81", "busybox", "sh", "-c",
		`echo hello >/tmp/index.html; httpd -p 81 -h /tmp; tail -f /dev/null | nc -l -p 80 | wc -c >/tmp/got & exec sleep 1000`)
	var stream net.Conn
	w.eventually("a connection to the receiver", func() (ok bool) {
		w.inNetns(func() {
			var err error
			stream, err = net.DialTimeout("tcp", "10.81.0.9:80", 10*time.Second) // one that is given up would be the receiver's only one
			ok = err == nil
		})
		return ok
	})
	stop, sent := make(chan struct{}), make(chan int, 1)
	end := sync.OnceFunc(func() { close(stop) })
	defer end()
	go func() { // ends at stop
		n, chunk := 0, make([]byte, 64<<10)
		defer func() { stream.Close(); sent <- n }()
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
			}
			k, err := stream.Write(chunk)
			if n += k; err != nil {
				t.Errorf("after %d bytes: %v", n, err)
				return
			}
		}
	}()
	for i := range 10 {
		w.conex("network", "connect", "--gw-priority", strconv.Itoa(i%2), "coming", "receiver")
		if got := w.get("http://127.0.0.1:18080/"); got != "hello\n" {
			t.Errorf("the published port, connected: %q", got)
		}
		w.conex("network", "disconnect", "coming", "receiver")
		if got := w.get("http://127.0.0.1:18080/"); got != "hello\n" {
			t.Errorf("the published port, disconnected: %q", got)
		}
	}
	end()
	want := strconv.Itoa(<-sent)
	var got string
	w.eventually("the end of the stream", func() bool {
		got = strings.TrimSpace(w.conex("exec", "receiver", "cat", "/tmp/got"))
		return got != ""
	})
	if got != want {
		t.Errorf("%s bytes arrived of %s", got, want)
	}
	w.conex("rm", "-f", "receiver")
	w.conex("network", "rm", "steady", "coming")
}

// TestConnectKilled kills client, monitor or both in the middle of connect and disconnect. The container's next run is on the networks that
// its record names, with nothing left of others: removing them all succeeds, and the world's end looks for leaks.
func TestConnectKilled(t *testing.T) {
	w := limitsWorld(t)
	w.conex("network", "create", "--subnet", "10.83.0.0/24", "a")
	w.conex("network", "create", "--subnet", "10.84.0.0/24", "b")
	rounds := 12
	if n, err := strconv.Atoi(os.Getenv("CONEX_KILLS")); err == nil {
		rounds = n
	}
	for i := range rounds {
		name := fmt.Sprintf("c%d", i)
		w.conex("run", "-d", "--name", name, "--network", "name=a,ip=10.83.0.77", "-p", "18081:80", "busybox", "sleep", "1000")
		id := w.conex("inspect", "-f", "{{.Id}}", name)
		monitor := w.monitorOf(id)
		action := []string{"network", "connect", "--gw-priority", "1", "--ip", "10.84.0.77", "b", name}
		if i%2 == 1 {
			w.conex(action...)
			action = []string{"network", "disconnect", "b", name}
		}
		cmd := w.command(action...)
		w.start(cmd)
		// Moments from before the request to after its end.
		time.Sleep(time.Duration(i*i%37) * time.Millisecond)
		if i%3 != 1 {
			kill9(t, monitor)
		}
		if i%3 != 0 {
			kill9(t, cmd.Process.Pid)
		}
		_ = cmd.Wait() // it was killed, or its monitor was
		if i%3 != 1 {  // the kernel takes a moment to end all of its threads, and the lock with the last
			w.eventually("the settling", func() bool { return w.conex("inspect", "-f", "{{.State.Running}}", name) == "false" })
		}
		w.conex("stop", "-t", "0", name) // a monitor that lives ends what it was asked for
		want := strings.Fields(w.conex("inspect", "-f", `{{range $k, $v := .NetworkSettings.Networks}}{{$k}} {{end}}`, name))
		w.conex("start", name)
		if got := w.conex("exec", name, "sh", "-c", "ls /sys/class/net | grep -c eth"); got != strconv.Itoa(len(want)) {
			t.Errorf("round %d: %s interfaces on networks %v", i, got, want)
		}
		for _, n := range []string{"a", "b"} {
			on := w.conex("network", "inspect", "-f", "{{range .Containers}}{{.IPv4Address}}{{end}}", n)
			if (on != "") != strings.Contains(strings.Join(want, " "), n) {
				t.Errorf("round %d: network %s has %q, the record says %v", i, n, on, want)
			}
		}
		w.conex("rm", "-f", name)
	}
	w.conex("network", "rm", "a", "b")
}
