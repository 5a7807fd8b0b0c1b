package monitor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"conex/internal/container"
)

// server answers each connection with fn and returns a probe of itself.
func probeServer(t *testing.T, fn func(c net.Conn)) *container.Probe {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); fn(c) }()
		}
	}()
	p, err := container.ParseProbe([]string{"CMD", "http://" + l.Addr().String() + "/health?deep=1"})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProbe(t *testing.T) {
	endless := func(c net.Conn, s string) {
		for {
			if _, err := io.WriteString(c, s); err != nil {
				return
			}
		}
	}
	says := func(s string) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = c.Read(make([]byte, 4096))
			_, _ = io.WriteString(c, s)
		}
	}
	for _, c := range []struct {
		name    string
		fn      func(net.Conn)
		out     string
		failure string
	}{
		{"ok", says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"), "HTTP/1.1 200 OK\n", ""},
		{"redirect", says("HTTP/1.1 302 Found\r\nLocation: http://192.0.2.1/\r\n\r\n"), "HTTP/1.1 302 Found\n", ""},
		{"bare newlines", says("HTTP/1.0 204 x\n\n"), "HTTP/1.0 204 x\n", ""},
		{"early hints", says("HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"), "HTTP/1.1 200 OK\n", ""},
		{"unwell", says("HTTP/1.1 503 Busy\r\nContent-Length: 7\r\n\r\nno \xffdb\n"), "", "HTTP/1.1 503 Busy\nno \ufffddb"},
		{"chunked", says("HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhy?\n\r\n0\r\n\r\n"), "", "HTTP/1.1 500 No\nwhy?"},
		{"escapes", says("HTTP/1.1 500 \x1b[31mred\r\n\r\n"), "", "HTTP/1.1 500 \ufffd[31mred"},
		{"switching", says("HTTP/1.1 101 Up\r\n\r\n"), "", "HTTP/1.1 101 Up"},
		{"closed", func(net.Conn) {}, "", "read answer: "},
		{"half", says("HTTP/1.1 200 OK\r\nX: y\r\n"), "", "ended before the answer's headers did"},
		{"another protocol", says("SSH-2.0-x\r\n"), "", "is not HTTP/1"},
		{"no status", says("HTTP/1.1 OK\r\n\r\n"), "", "has no status"},
		{"negative", says("HTTP/1.1 -20 OK\r\n\r\n"), "", "has no status"},
		{"endless headers", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n"); endless(c, "X: y\r\n") }, "", "longer than 8192 bytes"},
		{"endless hints", func(c net.Conn) { endless(c, "HTTP/1.1 103 x\r\n\r\n") }, "", "longer than 8192 bytes"},
		{"endless body", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n"); endless(c, "xxxxxxxxxxxxxxxx") }, "HTTP/1.1 200 OK\n", ""},
		{"endless failure", func(c net.Conn) { _, _ = io.WriteString(c, "HTTP/1.1 500 x\r\n\r\n"); endless(c, "xxxxxxxxxxxxxxxx") }, "", "HTTP/1.1 500 x\nxxxx"},
		{"lies about its length", says("HTTP/1.1 500 x\r\nContent-Length: 99999999999999999999\r\n\r\nhm"), "", "HTTP/1.1 500 x\nhm"},
	} {
		t.Run(c.name, func(t *testing.T) {
			out, err := probe(t.Context(), probeServer(t, c.fn), os.Getpid())
			if out != c.out || (err == nil) != (c.failure == "") || err != nil && !strings.Contains(err.Error(), c.failure) {
				// A server that closes with our request unread resets the connection, or ends it.
				if c.name == "closed" && errors.Is(err, io.EOF) || c.name == "closed" && err != nil {
					return
				}
				t.Errorf("%q %v, want %q %q", out, err, c.out, c.failure)
			}
			if err != nil && len(err.Error()) > 2000 {
				t.Errorf("%d bytes of error", len(err.Error()))
			}
		})
	}
	var request bytes.Buffer
	p := probeServer(t, func(c net.Conn) {
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		request.Write(b[:n])
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\n")
	})
	if _, err := probe(t.Context(), p, os.Getpid()); err != nil || !strings.HasPrefix(request.String(), "GET /health?deep=1 HTTP/1.1\r\nHost: "+p.Authority()+"\r\n") {
		t.Errorf("%q %v", request.String(), err)
	}
	// Nobody listens; somebody listens and says nothing.
	if _, err := probe(t.Context(), &container.Probe{Host: "localhost", Port: 1}, os.Getpid()); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v", err)
	}
	silent := make(chan struct{})
	defer close(silent)
	p = probeServer(t, func(net.Conn) { <-silent })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := probe(ctx, p, os.Getpid()); err == nil || ctx.Err() == nil {
		t.Errorf("%v", err)
	}
	p.HTTP = false
	if out, err := probe(t.Context(), p, os.Getpid()); out != "" || err != nil {
		t.Errorf("tcp: %q %v", out, err)
	}
}

// FuzzParseAnswer has a container's server say anything.
func FuzzParseAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "HTTP/1.1 100 x\r\n\r\nHTTP/1.1 204 x\n\n", "HTTP/1.", "HTTP/1.1 999 \x1b\r\n\r\n",
		"HTTP/1.1 200\n\nx", "x", "HTTP/1.1 200 \n\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		a, ok, err := parseAnswer(data)
		if err != nil {
			if ok || strings.ContainsAny(err.Error(), "\x1b\n\r") {
				t.Fatalf("%v %q", ok, err)
			}
			return
		}
		if !ok {
			return
		}
		if a.code < 101 || a.code > 999 || a.length < -1 || !bytes.HasSuffix(data, a.body) || strings.ContainsAny(a.status, "\x1b\n\r") {
			t.Fatalf("%+v", a)
		}
	})
}
