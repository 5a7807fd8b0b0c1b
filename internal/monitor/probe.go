package monitor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"conex/internal/container"
	"conex/internal/linux/netlink"

	"golang.org/x/sys/unix"
)

// Bounds on what a probe takes from a server, which is the container's and may be hostile.
const (
	probeHead = 8 << 10         // of status lines and headers
	probeBody = 64 << 10        // that is read, so that an honest server is not cut off
	probeText = 1024            // of the body that is kept of a failure
	probeLast = 1 * time.Second // for the body: the status is known by then
)

// probe makes one built-in check in the network namespace of process pid. An error is a failure of the check, in words for its log.
// The container's server can hold it until ctx ends, and cost it a few kilobytes.
func probe(ctx context.Context, p *container.Probe, pid int) (output string, err error) {
	addrs, err := p.Addrs()
	if err != nil {
		return "", err
	}
	netns, err := os.Open("/proc/" + strconv.Itoa(pid) + "/ns/net")
	if err != nil {
		return "", err
	}
	defer netns.Close()
	var conn *os.File
	var errs []error
	for _, a := range addrs {
		if conn, err = dialIn(ctx, netns, a); err == nil {
			break
		}
		errs = append(errs, fmt.Errorf("connect to %s: %w", a, err))
	}
	if conn == nil {
		return "", errs[0] // the second is ::1, which most servers leave out
	}
	defer conn.Close()
	if !p.HTTP {
		return "", nil
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	return get(conn, p)
}

// dialIn opens a connection inside a network namespace. A thread is in there for the moment of two system calls; the socket belongs
// to the namespace from then on, and is waited for as any other.
func dialIn(ctx context.Context, netns *os.File, to netip.AddrPort) (*os.File, error) {
	family := unix.AF_INET6
	var sa unix.Sockaddr = &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	if to.Addr().Is4() {
		family, sa = unix.AF_INET, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	fd := -1
	err := netlink.In(netns, func() (err error) {
		if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		if err = unix.Connect(fd, sa); errors.Is(err, unix.EINPROGRESS) || errors.Is(err, unix.EINTR) {
			err = nil
		}
		return err
	})
	if err != nil {
		if fd >= 0 {
			unix.Close(fd)
		}
		return nil, err
	}
	conn := os.NewFile(uintptr(fd), "probe")
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	rc, err := conn.SyscallConn()
	if err == nil {
		var cerr error
		err = rc.Write(func(fd uintptr) bool {
			n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			if err == nil && n != 0 {
				err = unix.Errno(n)
			}
			if err == nil {
				_, err = unix.Getpeername(int(fd))
				if errors.Is(err, unix.ENOTCONN) {
					return false // not yet
				}
			}
			cerr = err
			return true
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// get asks for a page and judges its status. There are no redirects to follow: 3xx is an answer of somebody who is well.
func get(conn *os.File, p *container.Probe) (string, error) {
	_, err := io.WriteString(conn, "GET "+p.Path+" HTTP/1.1\r\nHost: "+p.Authority()+"\r\nUser-Agent: conex-health\r\nAccept: */*\r\nConnection: close\r\n\r\n")
	if err != nil {
		return "", fmt.Errorf("send request: %w", err)
	}
	buf := make([]byte, 0, 1024)
	var a httpAnswer
	for {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := conn.Read(buf[len(buf):min(cap(buf), probeHead)])
		buf = buf[:len(buf)+n]
		var ok bool
		var perr error
		if a, ok, perr = parseAnswer(buf); perr != nil {
			return "", perr
		}
		if ok {
			break
		}
		switch {
		case len(buf) >= probeHead:
			return "", fmt.Errorf("the answer's headers are longer than %d bytes", probeHead)
		case errors.Is(err, io.EOF):
			return "", errors.New("the connection ended before the answer's headers did")
		case err != nil:
			return "", fmt.Errorf("read answer: %w", err)
		}
	}
	body := bytes.Clone(a.body)
	left := probeBody
	if a.length >= 0 {
		left = int(min(a.length, probeBody))
	}
	left -= len(body)
	// Should the check's time end in between, the status stands as well. An error can't be: it is a socket.
	_ = conn.SetDeadline(time.Now().Add(probeLast))
	chunk := make([]byte, 4<<10)
	for left > 0 && !(a.chunked && bytes.HasSuffix(body, []byte("\r\n0\r\n\r\n"))) {
		n, err := conn.Read(chunk[:min(left, len(chunk))])
		left -= n
		body = append(body, chunk[:n]...)
		if len(body) > probeText+16 { // the last bytes tell the end of a chunked body
			body = append(body[:probeText], body[len(body)-16:]...)
		}
		if err != nil {
			break // the status stands, whatever becomes of the body
		}
	}
	if a.code >= 200 && a.code < 400 {
		return a.status + "\n", nil
	}
	if a.chunked {
		if _, after, ok := bytes.Cut(body, []byte("\r\n")); ok {
			body, _, _ = bytes.Cut(after, []byte("\r\n0\r\n"))
		}
	}
	return "", errors.New(strings.TrimSpace(a.status + "\n" + strings.ToValidUTF8(string(body[:min(len(body), probeText)]), "\ufffd")))
}

// httpAnswer is the beginning of an HTTP/1 answer.
type httpAnswer struct {
	code    int
	status  string // the status line, printable
	length  int64  // of the body, -1 when it was not said
	chunked bool
	body    []byte // what has come of it, a part of the data
}

// parseAnswer reads status line and headers of an HTTP/1 answer, behind answers of the kind "wait" (1xx). False when data ends too
// early. An error says that it can't become one.
func parseAnswer(data []byte) (httpAnswer, bool, error) {
	for {
		const proto = "HTTP/1."
		if n := min(len(data), len(proto)); string(data[:n]) != proto[:n] {
			return httpAnswer{}, false, fmt.Errorf("the answer is not HTTP/1: %q", data[:min(len(data), 64)])
		}
		end, skip := bytes.Index(data, []byte("\r\n\r\n")), 4
		if i := bytes.Index(data, []byte("\n\n")); i >= 0 && (end < 0 || i < end) {
			end, skip = i, 2
		}
		if end < 0 {
			return httpAnswer{}, false, nil
		}
		line, rest, _ := bytes.Cut(data[:end], []byte("\n"))
		line = bytes.TrimSuffix(line, []byte("\r"))
		a := httpAnswer{status: container.Printable(string(line[:min(len(line), 256)])), length: -1, body: data[end+skip:]}
		_, after, _ := strings.Cut(string(line), " ")
		digits, _, _ := strings.Cut(after, " ")
		code, err := strconv.Atoi(digits)
		if err != nil || len(digits) != 3 || code < 100 {
			return httpAnswer{}, false, fmt.Errorf("the answer has no status: %q", line[:min(len(line), 64)])
		}
		if code < 200 && code != 101 {
			data = a.body
			continue
		}
		a.code = code
		for h := range bytes.Lines(rest) {
			name, value, _ := strings.Cut(string(h), ":")
			value = strings.TrimSpace(value)
			switch strings.ToLower(strings.TrimSpace(name)) {
			case "content-length":
				if n, err := strconv.ParseInt(value, 10, 64); err == nil && n >= 0 {
					a.length = n
				}
			case "transfer-encoding":
				a.chunked = strings.Contains(strings.ToLower(value), "chunked")
			}
		}
		return a, true, nil
	}
}
