// Package control owns the wire between a container's monitor and everybody else: paths, types, stream framing, and the client.
//
// It is HTTP/1.1 over the unix socket c/<id>/sock, in the manner of Docker's Engine API:
//
//	GET  /wait                                   container.Exit, when the present run has ended
//	POST /kill?signal=TERM&for=
//	POST /stop?signal=&t=10&for=restart          container.Exit
//	POST /resize?h=&w=[&exec=id]
//	POST /attach?stdin=1&stdout=1&stderr=1[&framed=1]   101, then streams
//	POST /exec                                   ExecRequest; 101 with the id in the header Conex-Exec-Id, then streams
//	POST /freeze                                 101 when every process stands still; they do until the client closes its half, or dies
//	POST /pause, POST /unpause                   as /freeze, without a connection: until the other one, or the end
//	POST /update                                 container.Changes
//	POST /ports                                  container.PortChange
//	POST /connect                                container.Attachment
//	POST /disconnect?network=ID&name=
//	GET  /top                                    {"pids": [...]}, host process ids
//
// An error has a status of 400 or more and a body {"message", "exitCode"}.
//
// After a 101 the client sends plain bytes, the command's input, and closes its half for the end of it. The other way come
// frames as in Docker's attach (type, three zero bytes, length as 32 bits big endian, data) or, for Docker's own clients with a
// terminal, plain bytes. With framed=1 there are always frames, and the last is of type FrameEnd with the JSON of a
// container.Exit: it comes in order behind the last output, so that nobody has to ask for the exit code.
package control

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"conex/internal/cdi"
	"conex/internal/plainjson"
	"os"

	"conex/internal/container"

	"golang.org/x/sys/unix"
)

// Types of frames: Docker's, and one of ours.
const (
	FrameStdout = 1
	FrameStderr = 2
	FrameEnd    = 4
)

// Thawed is what the monitor sends at the end of a /freeze that lasted until the client ended it.
const Thawed = "thawed\n"

// HeaderExecID is the response header with an exec's id.
const HeaderExecID = "Conex-Exec-Id"

// HeaderLen is the length of a frame's header in bytes.
const HeaderLen = 8

// maxEnd bounds the end frame; the frames of output are copied through, whatever their length.
const maxEnd = 64 << 10

// Header returns a frame's header for n bytes of data.
func Header(kind byte, n int) [HeaderLen]byte {
	var h [HeaderLen]byte
	h[0] = kind
	binary.BigEndian.PutUint32(h[4:], uint32(n))
	return h
}

// ErrGone says that no monitor answers: the container does not run.
var ErrGone = errors.New("container is not running")

// ErrThawed says that a container which was frozen ran again before its time: somebody stopped or killed it, or it ended.
var ErrThawed = errors.New("it was stopped or killed meanwhile")

// Error is what the monitor answered instead of doing what it was asked.
type Error struct {
	// Status is the HTTP status: 400 for a senseless request, 404, 409 for the wrong state, 500.
	Status int `json:"-"`
	// Message is for people.
	Message string `json:"message"`
	// ExitCode is 126 or 127 for a command that can't be executed, 0 otherwise.
	ExitCode int `json:"exitCode,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// ExecRequest asks for a further process in the container.
type ExecRequest struct {
	Cmd        []string `json:"cmd"`
	Env        []string `json:"env,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"workingDir,omitempty"`
	Tty        bool     `json:"tty,omitempty"`
	// Stdin connects the command's input; without it the input is /dev/null.
	Stdin bool `json:"stdin,omitempty"`
	// Detach starts the command without streams: the answer is 200 instead of 101.
	Detach     bool `json:"detach,omitempty"`
	Privileged bool `json:"privileged,omitempty"`
	// Rows and Cols are the terminal's first size; 0 leaves it as the kernel makes it.
	Rows uint16 `json:"rows,omitempty"`
	Cols uint16 `json:"cols,omitempty"`
}

// Processes is the answer to GET /top.
type Processes struct {
	Pids []int `json:"pids"`
}

// StartRequest is what the engine gives to a new monitor, on its standard input.
type StartRequest struct {
	// Root and State are the engine's folders, ID the container.
	Root  string `json:"root"`
	State string `json:"state"`
	ID    string `json:"id"`
	// Runtime is the program of an OCI runtime to use instead of the built-in one.
	Runtime string `json:"runtime,omitempty"`
	// Lower are the layers' mounted folders, top first.
	Lower []string `json:"lower"`
	// Images are those of images that are mounted into the container, by destination.
	Images map[string][]string `json:"images,omitempty"`
	// Attach says that a client is attached from the start, with AttachStdin to the input too.
	Attach      bool `json:"attach,omitempty"`
	AttachStdin bool `json:"attachStdin,omitempty"`
	// Rows and Cols are the attached terminal's size.
	Rows uint16 `json:"rows,omitempty"`
	Cols uint16 `json:"cols,omitempty"`
	// DNS and DNSSearch are the configuration's, for containers that name none.
	DNS       []string `json:"dns,omitempty"`
	DNSSearch []string `json:"dnsSearch,omitempty"`
	// DNSDomains are the configuration's servers for some domains.
	DNSDomains map[string][]string `json:"dnsDomains,omitempty"`
	// LogDriver and LogOptions are the container's merged with the configuration's.
	LogDriver  string            `json:"logDriver,omitempty"`
	LogOptions map[string]string `json:"logOptions,omitempty"`
	// SystemdCgroup has systemd make the container's cgroup.
	SystemdCgroup bool `json:"systemdCgroup,omitempty"`
	// Restarts continues a count that a dead monitor left.
	Restarts int `json:"restarts,omitempty"`
	// Edits are what the container's CDI devices change in it; nil without such.
	Edits *cdi.Edits `json:"edits,omitempty"`
}

// ForAttached is the command of a signal that came through an attached command's terminal.
const ForAttached = container.ByAttached

// ForShutdown is the command of a stop that is not a user's wish: the machine goes down.
const ForShutdown = container.ByShutdown

// Name is the monitor's argv[0].
const Name = "conex-monitor"

// Placeholder is the monitor's argument until it knows its container; then the beginning of the container's id stands there.
const Placeholder = "------------"

// File descriptors of a new monitor. Output and error are closed until it has its log.
const (
	// RequestFD is a stream socket: SendStart's message comes in, a line of JSON, the Report, goes out. A monitor whose socket ends
	// without a message was not needed.
	RequestFD = 0
	// SelfFD is the file that the monitor was executed from (see mount.ReadOnlySelf). The monitor forbids its further execution
	// before anything else. Whoever started it can't: until the kernel has mapped the program, which is after the
	// parent's half of an exec has succeeded, that would kill it.
	SelfFD = 3
)

// ErrNotNeeded says that whoever started a monitor went away without a request.
var ErrNotNeeded = errors.New("not needed")

// maxFiles is how many files come with a request: the container's monitor.lock, locked already, the monitor's log, and with
// StartRequest.Attach one end of a socket pair.
const maxFiles = 3

// SendStart writes a request to a new monitor, with its files in the order of maxFiles.
func SendStart(sock *os.File, req StartRequest, files []*os.File) error {
	b, err := plainjson.Marshal(req)
	if err != nil {
		return err
	}
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	rc, err := sock.SyscallConn()
	if err != nil {
		return err
	}
	var n int
	werr := rc.Write(func(fd uintptr) bool {
		n, err = unix.SendmsgN(int(fd), b, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		return err != unix.EAGAIN
	})
	if err = errors.Join(werr, err); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	if _, err := sock.Write(b[n:]); err != nil {
		return fmt.Errorf("send request: %w", err)
	}
	if cerr := rc.Control(func(fd uintptr) { err = unix.Shutdown(int(fd), unix.SHUT_WR) }); cerr != nil {
		err = cerr
	}
	return err
}

// ReceiveStart is SendStart's other side, for the monitor. ErrNotNeeded when nothing comes.
func ReceiveStart(fd int) (req StartRequest, files []*os.File, err error) {
	buf, oob := make([]byte, 16<<10), make([]byte, unix.CmsgSpace(4*maxFiles))
	var n, oobn int
	for {
		n, oobn, _, _, err = unix.Recvmsg(fd, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return req, nil, fmt.Errorf("receive request: %w", err)
	}
	if n == 0 {
		return req, nil, ErrNotNeeded
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return req, nil, fmt.Errorf("receive request: %w", err)
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return req, nil, fmt.Errorf("receive request: %w", err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "request"))
		}
	}
	b := buf[:n:n]
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return req, files, fmt.Errorf("receive request: %w", err)
		}
		if n == 0 {
			break
		}
		b = append(b, buf[:n]...)
	}
	if err := plainjson.Unmarshal(b, &req); err != nil {
		return req, files, fmt.Errorf("receive request: %w", err)
	}
	if want := maxFiles - 1 + btoi(req.Attach); len(files) != want {
		return req, files, fmt.Errorf("receive request: %d files instead of %d", len(files), want)
	}
	return req, files, nil
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Report is the line that a monitor writes when the container's process runs, or why it does not.
type Report struct {
	Pid int `json:"pid,omitempty"`
	// Error is empty on success; ExitCode is then 0, else Docker's 125, 126 or 127.
	Error    string `json:"error,omitempty"`
	ExitCode int    `json:"exitCode,omitempty"`
	// PortTaken says that Error is about a host port that is in use.
	PortTaken bool `json:"portTaken,omitempty"`
}

// frameBuffer is how much of a stream is read at once.
const frameBuffer = 256 << 10

// copyFrames splits frames from r onto stdout and stderr (nil discards) until FrameEnd, whose data it returns, or the end of r
// (nil data). A writer's error ends it.
func copyFrames(stdout, stderr io.Writer, r io.Reader) ([]byte, error) {
	f := frames{r: r, buf: make([]byte, frameBuffer)}
	for {
		h, err := f.next(HeaderLen)
		if err == io.EOF {
			return nil, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read stream: %w", err)
		}
		n := int64(binary.BigEndian.Uint32(h[4:]))
		var w io.Writer
		switch h[0] {
		case FrameStdout:
			w = stdout
		case FrameStderr:
			w = stderr
		case FrameEnd:
			if n > maxEnd {
				return nil, fmt.Errorf("read stream: end frame of %d bytes", n)
			}
			b, err := f.next(int(n))
			if err != nil {
				return nil, fmt.Errorf("read stream: %w", io.ErrUnexpectedEOF)
			}
			return b, nil
		default:
			return nil, fmt.Errorf("read stream: frame of unknown type %d", h[0])
		}
		for n > 0 {
			b, err := f.some(n)
			if err == io.EOF {
				return nil, nil
			}
			if err != nil {
				return nil, fmt.Errorf("read stream: %w", err)
			}
			n -= int64(len(b))
			if w == nil {
				continue
			}
			if _, err := w.Write(b); err != nil {
				return nil, err
			}
		}
	}
}

// frames reads a stream in large pieces, of which nothing is copied.
type frames struct {
	r          io.Reader
	buf        []byte
	start, end int
}

// next returns the next n bytes, at most the buffer's size, valid until the next call. io.EOF says that there are not as many.
func (f *frames) next(n int) ([]byte, error) {
	for f.end-f.start < n {
		if f.start > 0 {
			f.end = copy(f.buf, f.buf[f.start:f.end])
			f.start = 0
		}
		k, err := f.r.Read(f.buf[f.end:])
		f.end += k
		if k == 0 && err != nil {
			return nil, err
		}
	}
	b := f.buf[f.start : f.start+n]
	f.start += n
	return b, nil
}

// some returns between one and n of the next bytes.
func (f *frames) some(n int64) ([]byte, error) {
	if f.start == f.end {
		f.start, f.end = 0, 0
	}
	if f.end == 0 {
		k, err := f.r.Read(f.buf)
		if k == 0 && err != nil {
			return nil, err
		}
		f.end = k
	}
	b := f.buf[f.start:min(int64(f.end), int64(f.start)+n)]
	f.start += len(b)
	return b, nil
}
