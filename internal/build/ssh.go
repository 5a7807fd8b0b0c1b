package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

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

// readOnly lets a step list keys and sign with them, and nothing else.
type readOnly struct{ agent.ExtendedAgent }

var errReadOnly = errors.New("a build step may only use the agent's keys")

func (readOnly) Add(agent.AddedKey) error                 { return errReadOnly }
func (readOnly) Remove(ssh.PublicKey) error               { return errReadOnly }
func (readOnly) RemoveAll() error                         { return errReadOnly }
func (readOnly) Lock([]byte) error                        { return errReadOnly }
func (readOnly) Unlock([]byte) error                      { return errReadOnly }
func (readOnly) Extension(string, []byte) ([]byte, error) { return nil, agent.ErrExtensionUnsupported }

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

// answer serves one client until it hangs up, sends what is no request, or ctx ends.
func (s *agentSource) answer(ctx context.Context, c net.Conn) {
	defer c.Close()
	a := s.keys
	if s.socket != "" {
		up, err := dialAgent(ctx, s.socket)
		if err != nil {
			return // the client sees an agent that hangs up
		}
		defer up.Close()
		defer context.AfterFunc(ctx, func() { up.Close() })()
		a = agent.NewClient(up)
	}
	defer context.AfterFunc(ctx, func() { c.Close() })()
	_ = agent.ServeAgent(readOnly{a}, c) // how it ended is the client's affair
}
