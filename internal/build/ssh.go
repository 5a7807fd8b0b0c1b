package build

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"conex/internal/ondemand"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/sys/unix"
)

// maxKey bounds a private key's file, in bytes.
const maxKey = 100 << 10

// agentSource is what answers for an SSH agent in steps: the user's own, by its socket, or a ring of keys read from files.
type agentSource struct {
	socket string
	keys   agent.ExtendedAgent
}

// newAgentSource checks that an agent can be had. Keys are read now and stay in this process's memory.
func newAgentSource(a Agent) (*agentSource, error) {
	if len(a.Paths) == 0 {
		return nil, errors.New("SSH_AUTH_SOCK is not set: start an agent, or name its socket or a key: --ssh default=PATH")
	}
	ondemand.SSH()
	s := &agentSource{}
	for _, p := range a.Paths {
		st, err := os.Stat(p)
		if err != nil {
			return nil, err
		}
		if st.Mode()&os.ModeSocket != 0 {
			if len(a.Paths) > 1 {
				return nil, errors.New("a socket stands alone: either one socket or keys")
			}
			c, err := dialAgent(context.Background(), p)
			if err != nil {
				return nil, err
			}
			c.Close()
			return &agentSource{socket: p}, nil
		}
		if s.keys == nil {
			s.keys = agent.NewKeyring().(agent.ExtendedAgent)
		}
		if err := addKey(s.keys, p); err != nil {
			return nil, fmt.Errorf("key %s: %w", p, err)
		}
	}
	return s, nil
}

func addKey(ring agent.Agent, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKey+1))
	if err != nil {
		return err
	}
	if len(data) > maxKey {
		return errors.New("it is too big for a private key")
	}
	k, err := ssh.ParseRawPrivateKey(data)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return errors.New("it has a passphrase: add it to an agent with ssh-add and give that, --ssh default")
	}
	if err != nil {
		return errors.New("it is no private key that can be read")
	}
	return ring.Add(agent.AddedKey{PrivateKey: k, Comment: path})
}

func dialAgent(ctx context.Context, path string) (net.Conn, error) {
	d := net.Dialer{Timeout: 2 * time.Second}
	return d.DialContext(ctx, "unix", path)
}

// agent gives a step the socket that a --mount=type=ssh asks for. An agent that nobody gave is left out unless it is required, as in
// Docker.
func (m *mounts) agent(i int, op mountOp) error {
	src := m.x.grants.agents[op.ID]
	if src == nil {
		if op.Required {
			return fmt.Errorf("ssh agent %s: %w: give the build --ssh %s", op.ID, errNotGiven, op.ID)
		}
		return nil
	}
	p, err := m.privateFolder()
	if err != nil {
		return fmt.Errorf("ssh agent %s: %w", op.ID, err)
	}
	name := fmt.Sprintf("ssh.%d", i)
	stop, err := src.serve(p.root, name, op)
	if err != nil {
		return fmt.Errorf("ssh agent %s: %w", op.ID, err)
	}
	m.held.Add(stop)
	m.specs = append(m.specs, specs.Mount{
		Destination: op.Target, Type: "bind", Source: filepath.Join(p.dir, name), Options: []string{"bind", "nosuid", "nodev", "noexec"},
	})
	return nil
}

// serve listens on a socket in a folder until stop is called, which waits for all who were served.
func (s *agentSource) serve(folder *os.File, name string, op mountOp) (stop func(), err error) {
	path := fmt.Sprintf("/proc/self/fd/%d/%s", folder.Fd(), name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the number may be another folder's by then
	if err := errors.Join(os.Chown(path, op.UID, op.GID), unix.Chmod(path, op.Mode&0o777)); err != nil {
		l.Close()
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			all.Go(func() { s.answer(ctx, c) })
		}
	})
	return func() {
		cancel()
		l.Close()
		all.Wait()
	}, nil
}

// The agent protocol (draft-ietf-sshm-ssh-agent): each message is its length and its type, in the numbers that a step may send and get.
const (
	agentFailure    = 5
	agentIdentities = 11
	agentAnswer     = 12
	agentSign       = 13
	agentSignature  = 14

	// maxAgentMessage bounds a message, in bytes; OpenSSH's limit.
	maxAgentMessage = 256 << 10
)

// answer serves one client until it hangs up, sends what is no message, or ctx ends. A step may list keys and sign with them; whatever
// else it asks for is refused, before the user's agent hears of it.
func (s *agentSource) answer(ctx context.Context, c net.Conn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	ask := s.ring
	if s.socket != "" {
		up, err := dialAgent(ctx, s.socket)
		if err != nil {
			return // the client sees an agent that hangs up
		}
		defer up.Close()
		defer context.AfterFunc(ctx, func() { up.Close() })()
		ask = func(msg []byte) ([]byte, error) {
			if err := writeMessage(up, msg); err != nil {
				return nil, err
			}
			return readMessage(up)
		}
	}
	for {
		msg, err := readMessage(c)
		if err != nil {
			return
		}
		reply := []byte{agentFailure}
		if msg[0] == agentIdentities || msg[0] == agentSign {
			if reply, err = ask(msg); err != nil {
				return
			}
		}
		if writeMessage(c, reply) != nil {
			return
		}
	}
}

func readMessage(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[:])
	if n == 0 || n > maxAgentMessage {
		return nil, errors.New("no message of an SSH agent")
	}
	msg := make([]byte, n)
	_, err := io.ReadFull(r, msg)
	return msg, err
}

func writeMessage(w io.Writer, msg []byte) error {
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(msg))), msg...))
	return err
}

// ring answers for the keys.
func (s *agentSource) ring(msg []byte) ([]byte, error) {
	if msg[0] == agentIdentities {
		keys, err := s.keys.List()
		if err != nil {
			return []byte{agentFailure}, nil //nolint:nilerr // the client is told so
		}
		out := binary.BigEndian.AppendUint32([]byte{agentAnswer}, uint32(len(keys)))
		for _, k := range keys {
			out = append(out, ssh.Marshal(struct{ Blob, Comment string }{string(k.Blob), k.Comment})...)
		}
		return out, nil
	}
	var req struct {
		Blob, Data []byte
		Flags      uint32
	}
	if err := ssh.Unmarshal(msg[1:], &req); err != nil {
		return []byte{agentFailure}, nil //nolint:nilerr // as above
	}
	k := &agent.Key{Blob: req.Blob}
	if format, _, ok := cutString(req.Blob); ok {
		k.Format = string(format)
	}
	sig, err := s.keys.SignWithFlags(k, req.Data, agent.SignatureFlags(req.Flags))
	if err != nil {
		return []byte{agentFailure}, nil //nolint:nilerr // as above
	}
	return append([]byte{agentSignature}, ssh.Marshal(struct{ Signature []byte }{ssh.Marshal(sig)})...), nil
}

// cutString takes a string off the wire's form.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 4 {
		return nil, nil, false
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, false
	}
	return b[4 : 4+n], b[4+n:], true
}
