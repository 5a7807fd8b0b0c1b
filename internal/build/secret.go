package build

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"conex/internal/linux/mount"
	"conex/internal/safepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxSecret bounds a secret, in bytes; Docker's limit.
const maxSecret = 500 << 10

// secret is one --secret. What it holds is in this process's memory and in the mounts of the steps that ask for it, nowhere else: no key,
// record or error has it.
type secret struct {
	id   string
	from Secret

	once sync.Once
	data []byte
	err  error
}

// newSecret checks that a secret can be read.
func newSecret(id string, from Secret) (*secret, error) {
	s := &secret{id: id, from: from}
	if from.File == "" {
		return s, nil
	}
	st, err := os.Stat(from.File)
	if err == nil {
		err = unix.Faccessat(unix.AT_FDCWD, from.File, unix.R_OK, unix.AT_EACCESS)
	}
	var pe *os.PathError
	if errors.As(err, &pe) {
		err = pe.Err
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("secret %s: read %s: %w", id, from.File, err)
	case st.IsDir():
		return nil, fmt.Errorf("secret %s: %s is a folder", id, from.File)
	case st.Size() > maxSecret:
		return nil, s.tooBig()
	}
	return s, nil
}

func (s *secret) tooBig() error {
	return fmt.Errorf("secret %s is too big: %d kB at most", s.id, maxSecret>>10)
}

// read gives the secret's bytes. They are read once: the file may be a pipe.
func (s *secret) read() ([]byte, error) {
	s.once.Do(func() {
		if s.from.File == "" {
			s.data = []byte(os.Getenv(s.from.Env))
			return
		}
		f, err := os.Open(s.from.File)
		if err != nil {
			s.err = fmt.Errorf("secret %s: %w", s.id, err)
			return
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
		switch {
		case err != nil:
			s.err = fmt.Errorf("secret %s: %w", s.id, err)
		case len(data) > maxSecret:
			s.err = s.tooBig()
		default:
			s.data = data
		}
	})
	return s.data, s.err
}

// secret gives a step what a --mount=type=secret asks for. One that nobody gave is left out unless it is required, as in Docker.
func (m *mounts) secret(i int, op mountOp) error {
	s := m.x.grants.secrets[op.ID]
	if s == nil {
		if op.Required {
			return fmt.Errorf("secret %s: %w: give the build --secret id=%s,src=FILE", op.ID, errNotGiven, op.ID)
		}
		return nil
	}
	data, err := s.read()
	if err != nil {
		return err
	}
	m.x.vertex.j.hide(data)
	if op.Env != "" {
		if strings.IndexByte(string(data), 0) >= 0 {
			return fmt.Errorf("secret %s holds a NUL byte, which no variable can", op.ID)
		}
		m.env = append(m.env, op.Env+"="+string(data))
	}
	if op.Target == "" {
		return nil
	}
	p, err := m.privateFolder()
	if err != nil {
		return fmt.Errorf("secret %s: %w", op.ID, err)
	}
	name := fmt.Sprintf("secret.%d", i)
	if err := p.write(name, data, op); err != nil {
		return fmt.Errorf("secret %s: %w", op.ID, err)
	}
	out := specs.Mount{Destination: op.Target, Type: "bind", Source: filepath.Join(p.dir, name), Options: []string{"bind", "ro", "nosuid", "nodev"}}
	if op.Mode&0o111 == 0 {
		out.Options = append(out.Options, "noexec")
	}
	m.specs = append(m.specs, out)
	return nil
}

// private is a tmpfs of one container, which nobody else ever sees: it is attached in the container's mount namespace alone and is gone
// with the container, whoever is killed. Its pages are not swapped out where the kernel can do that (6.4).
type private struct {
	root *os.File
	dir  string // where the container's mounts find it
}

// privateFolder is the container's, made when it is first needed.
func (m *mounts) privateFolder() (*private, error) {
	if m.private != nil {
		return m.private, nil
	}
	params := []mount.Param{{Key: "source", Value: "tmpfs"}, {Key: "mode", Value: "0711"}}
	root, err := mount.New("tmpfs", append(params, mount.Param{Key: "noswap", Flag: true}), unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if errors.Is(err, unix.EINVAL) {
		root, err = mount.New("tmpfs", params, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	}
	if err != nil {
		return nil, err
	}
	dir, err := m.show(root)
	if err != nil {
		return nil, err
	}
	m.private = &private{root: root, dir: dir}
	return m.private, nil
}

// write makes a file of the owner and mode that op asks for.
func (p *private) write(name string, data []byte, op mountOp) error {
	f, err := safepath.OpenNoLinks(p.root, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chown(op.UID, op.GID)
	}
	if err == nil {
		err = unix.Fchmod(int(f.Fd()), op.Mode&0o777)
	}
	return errors.Join(err, f.Close())
}
