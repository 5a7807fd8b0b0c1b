package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"conex/internal/container"
	"conex/internal/plainjson"
)

// Client talks to one monitor. Every request is a connection of its own.
type Client struct{ sock string }

// NewClient returns a client for the socket at that path.
func NewClient(sock string) *Client { return &Client{sock} }

// maxPath is how long a socket's path may be (sockaddr_un has 108 bytes, one of them the final zero).
const maxPath = 107

// ShortPath gives fn a name for the socket that fits into a socket address: path itself, or one through /proc/self/fd.
func ShortPath(path string, fn func(path string) error) error {
	if len(path) <= maxPath {
		return fn(path)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return fn("/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + filepath.Base(path))
}

func (c *Client) dial(ctx context.Context) (*net.UnixConn, error) {
	var conn net.Conn
	err := ShortPath(c.sock, func(p string) (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, "unix", p)
		return err
	})
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, fmt.Errorf("reach the container's monitor: %w", err)
	}
	return conn.(*net.UnixConn), nil
}

// send makes a request and reads the answer's head. The caller closes conn.
func (c *Client) send(ctx context.Context, method, path string, q url.Values, body any, upgrade bool) (*net.UnixConn, *bufio.Reader, *http.Response, error) {
	var data io.Reader
	if body != nil {
		b, err := plainjson.Marshal(body)
		if err != nil {
			return nil, nil, nil, err
		}
		data = bytes.NewReader(b)
	}
	u := url.URL{Scheme: "http", Host: "conex", Path: path, RawQuery: q.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), data)
	if err != nil {
		return nil, nil, nil, err
	}
	if upgrade {
		req.Header.Set("Connection", "Upgrade")
		req.Header.Set("Upgrade", "tcp")
	}
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	br := bufio.NewReaderSize(conn, 32<<10)
	fail := func(err error) (*net.UnixConn, *bufio.Reader, *http.Response, error) {
		conn.Close()
		if ctx.Err() != nil {
			return nil, nil, nil, ctx.Err()
		}
		// The monitor went away between our connect and its answer.
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
			return nil, nil, nil, ErrGone
		}
		return nil, nil, nil, fmt.Errorf("talk to the container's monitor: %w", err)
	}
	if err := req.Write(conn); err != nil {
		return fail(err)
	}
	resp, err := http.ReadResponse(br, req)
	if err != nil {
		return fail(err)
	}
	if resp.StatusCode >= 400 {
		defer conn.Close()
		e := &Error{Status: resp.StatusCode}
		if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(e); err != nil {
			return nil, nil, nil, fmt.Errorf("talk to the container's monitor: status %d without a message: %w", resp.StatusCode, err)
		}
		return nil, nil, nil, e
	}
	return conn, br, resp, nil
}

// call makes a request and decodes the answer into result (nil: none is expected).
func (c *Client) call(ctx context.Context, method, path string, q url.Values, body, result any) error {
	conn, _, resp, err := c.send(ctx, method, path, q, body, false)
	if err != nil {
		return err
	}
	defer conn.Close()
	if result == nil {
		return nil
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := json.NewDecoder(resp.Body).Decode(result); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("talk to the container's monitor: %w", err)
	}
	return nil
}

// Ping returns when the monitor has answered. ErrGone says that there is none, or that it was about to die.
func (c *Client) Ping(ctx context.Context) error {
	return c.call(ctx, "GET", "/ping", nil, nil, nil)
}

// Wait returns when the present run has ended. ErrGone when it had ended before.
func (c *Client) Wait(ctx context.Context) (container.Exit, error) {
	var e container.Exit
	err := c.call(ctx, "GET", "/wait", nil, nil, &e)
	return e, err
}

// Kill sends a signal (name or number) to the container's first process.
func (c *Client) Kill(ctx context.Context, signal string) error {
	return c.call(ctx, "POST", "/kill", url.Values{"signal": {signal}}, nil, nil)
}

// Forward is Kill for a signal that an attached command got and passes on.
func (c *Client) Forward(ctx context.Context, signal string) error {
	return c.call(ctx, "POST", "/kill", url.Values{"signal": {signal}, "for": {ForAttached}}, nil, nil)
}

// Stop sends signal ("": the container's stop signal) and after timeout seconds (nil: the container's, or 10; negative: never)
// SIGKILL, and returns when the container has ended for good. command is what the user typed: stop, restart, rm.
func (c *Client) Stop(ctx context.Context, command, signal string, timeout *int) (container.Exit, error) {
	q := url.Values{"for": {command}}
	if signal != "" {
		q.Set("signal", signal)
	}
	if timeout != nil {
		q.Set("t", strconv.Itoa(*timeout))
	}
	var e container.Exit
	err := c.call(ctx, "POST", "/stop", q, nil, &e)
	return e, err
}

// Resize sets the terminal's size; execID "" means the container's own.
func (c *Client) Resize(ctx context.Context, execID string, rows, cols uint16) error {
	q := url.Values{"h": {strconv.Itoa(int(rows))}, "w": {strconv.Itoa(int(cols))}}
	if execID != "" {
		q.Set("exec", execID)
	}
	return c.call(ctx, "POST", "/resize", q, nil, nil)
}

// Top returns the host's ids of all processes in the container.
func (c *Client) Top(ctx context.Context) ([]int, error) {
	var p Processes
	err := c.call(ctx, "GET", "/top", nil, nil, &p)
	return p.Pids, err
}

// Pause stops every process in the container until Unpause.
func (c *Client) Pause(ctx context.Context) error {
	return c.call(ctx, "POST", "/pause", nil, nil, nil)
}

// Unpause lets a paused container go on.
func (c *Client) Unpause(ctx context.Context) error {
	return c.call(ctx, "POST", "/unpause", nil, nil, nil)
}

// Update changes limits and restart policy, in the kernel and in the record. A limit that the kernel refuses changes nothing.
func (c *Client) Update(ctx context.Context, changes container.Changes) error {
	return c.call(ctx, "POST", "/update", nil, changes, nil)
}

// ChangePorts publishes further ports and takes some back, in the kernel and in the record. An error changes nothing.
func (c *Client) ChangePorts(ctx context.Context, change container.PortChange) error {
	return c.call(ctx, "POST", "/ports", nil, change, nil)
}

// Connect joins a network that the container is not on yet.
func (c *Client) Connect(ctx context.Context, at container.Attachment) error {
	return c.call(ctx, "POST", "/connect", nil, at, nil)
}

// Disconnect leaves a network, named by what an attachment says of it.
func (c *Client) Disconnect(ctx context.Context, at container.Attachment) error {
	return c.call(ctx, "POST", "/disconnect", url.Values{"network": {at.NetworkID}, "name": {at.Network}}, nil, nil)
}

// Relink has the container look again where those are to which it has links.
func (c *Client) Relink(ctx context.Context) error {
	return c.call(ctx, "POST", "/relink", nil, nil, nil)
}

// Freeze stops every process in the container. They go on at Frozen.Thaw, at the latest at the end of this process, and when somebody
// stops or kills the container.
func (c *Client) Freeze(ctx context.Context) (*Frozen, error) {
	conn, br, _, err := c.send(ctx, "POST", "/freeze", nil, nil, true)
	if err != nil {
		return nil, err
	}
	return &Frozen{conn, br}, nil
}

// Frozen is a container that stands still.
type Frozen struct {
	conn *net.UnixConn
	r    *bufio.Reader
}

// Thaw lets the container go on. ErrThawed says that it did not stand still until now.
func (f *Frozen) Thaw() error {
	defer f.conn.Close()
	// An error means that the other side is gone, which the read says too.
	_ = f.conn.CloseWrite()
	b, _ := io.ReadAll(io.LimitReader(f.r, int64(len(Thawed))))
	if string(b) != Thawed {
		return ErrThawed
	}
	return nil
}

// Attach connects to the container's streams.
func (c *Client) Attach(ctx context.Context, stdin bool) (*Stream, error) {
	q := url.Values{"stdout": {"1"}, "stderr": {"1"}, "framed": {"1"}}
	if stdin {
		q.Set("stdin", "1")
	}
	conn, br, _, err := c.send(ctx, "POST", "/attach", q, nil, true)
	if err != nil {
		return nil, err
	}
	return &Stream{conn: conn, r: br}, nil
}

// Exec starts a further process. Without r.Detach the stream carries its input and output; with it the stream is nil.
// A command that can't be executed is an *Error with an ExitCode.
func (c *Client) Exec(ctx context.Context, r ExecRequest) (*Stream, error) {
	q := url.Values{"framed": {"1"}}
	conn, br, resp, err := c.send(ctx, "POST", "/exec", q, r, !r.Detach)
	if err != nil {
		return nil, err
	}
	if r.Detach {
		return nil, conn.Close()
	}
	return &Stream{conn: conn, r: br, ExecID: resp.Header.Get(HeaderExecID)}, nil
}

// Stream is an attached client's end.
type Stream struct {
	// ExecID names the exec; empty for the container's own streams.
	ExecID string
	conn   *net.UnixConn
	r      *bufio.Reader
}

// NewStream wraps the client's end of a socket pair (see StartRequest.Attach). f is closed.
func NewStream(f *os.File) (*Stream, error) {
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("attach: %w", err)
	}
	u, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, fmt.Errorf("attach: %s is not a unix socket", f.Name())
	}
	return &Stream{conn: u, r: bufio.NewReaderSize(u, 32<<10)}, nil
}

// CopyOutput copies output until the end and returns how the process ended; nil when the monitor went away without saying.
func (s *Stream) CopyOutput(stdout, stderr io.Writer) (*container.Exit, error) {
	b, err := copyFrames(stdout, stderr, s.r)
	if b == nil || err != nil {
		return nil, err
	}
	e := &container.Exit{}
	if err := json.Unmarshal(b, e); err != nil {
		return nil, fmt.Errorf("read stream: %w", err)
	}
	return e, nil
}

// Write sends input.
func (s *Stream) Write(p []byte) (int, error) { return s.conn.Write(p) }

// CloseWrite ends the input; output goes on.
func (s *Stream) CloseWrite() error { return s.conn.CloseWrite() }

// Close leaves. The process goes on.
func (s *Stream) Close() error { return s.conn.Close() }
