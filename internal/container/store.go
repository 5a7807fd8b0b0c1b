package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conex/internal/disk"
	"conex/internal/linux/quota"
)

var (
	// ErrNotFound says that no container has the given name or id; the text is Docker's "No such container: x".
	ErrNotFound = errors.New("no such container")
	// ErrNameTaken says that another container has the name.
	ErrNameTaken = errors.New("container name is already in use")
	// ErrName says that a name has characters that are not allowed.
	ErrName = errors.New("invalid container name")
	// ErrAmbiguous says that a short id fits several containers.
	ErrAmbiguous = errors.New("ambiguous container id")
	// ErrBusy says that a monitor, or somebody who starts, settles or removes the container, holds its lock.
	ErrBusy = errors.New("container is busy")
)

// NotFoundError is ErrNotFound for one name.
type NotFoundError struct{ Name string }

func (e *NotFoundError) Error() string { return "No such container: " + e.Name }

// Is makes errors.Is(err, ErrNotFound) true.
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// NameTakenError is ErrNameTaken, in Docker's words.
type NameTakenError struct{ Name, ID string }

func (e *NameTakenError) Error() string {
	return fmt.Sprintf("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+e.Name, e.ID)
}

// Is makes errors.Is(err, ErrNameTaken) true.
func (e *NameTakenError) Is(target error) bool { return target == ErrNameTaken }

// sameNameError is ErrNameTaken by the container itself, in Docker's words.
type sameNameError struct{}

func (sameNameError) Error() string {
	return "Renaming a container with the same name as its current name"
}

// Is makes errors.Is(err, ErrNameTaken) true.
func (sameNameError) Is(target error) bool { return target == ErrNameTaken }

// errNoName is what an empty word gets, in the words of Docker's client: often a variable that is not set.
var errNoName = fmt.Errorf("%w or ID: value is empty", ErrName)

// NameError is ErrName, in Docker's words.
type NameError struct{ Name string }

func (e *NameError) Error() string {
	return fmt.Sprintf("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", e.Name)
}

// Is makes errors.Is(err, ErrName) true.
func (e *NameError) Is(target error) bool { return target == ErrName }

// Store is the container store of one root and one state folder. It keeps nothing in memory.
type Store struct {
	root  *disk.Root
	state string
}

// Open returns the store. state is the runtime folder (/run/conex).
func Open(root *disk.Root, state string) *Store { return &Store{root: root, state: state} }

// RunDir returns the container's folder of volatile state, or a path in it.
func (s *Store) RunDir(id string, elem ...string) string {
	return filepath.Join(append([]string{s.state, "c", id}, elem...)...)
}

// Lock takes the container's monitor lock, or fails with ErrBusy at once. It makes the run folder. The container need not exist
// (any more).
func (s *Store) Lock(id string) (*disk.Lock, error) {
	path := s.RunDir(id, "monitor.lock")
	for {
		l, err := disk.TryAcquire(path)
		switch {
		case errors.Is(err, fs.ErrNotExist): // again while somebody removes the folder
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil && !errors.Is(err, fs.ErrExist) { // which it was for a moment
				return nil, fmt.Errorf("lock container: %w", err)
			}
		case errors.Is(err, disk.ErrLocked):
			if s.Watched(id) {
				return nil, ErrBusy
			} // else it was somebody who looked whether it is held, and shared it for a moment
		default:
			return l, err
		}
	}
}

// Watched reports whether somebody holds the container's monitor lock.
func (s *Store) Watched(id string) bool { return disk.Held(s.RunDir(id, "monitor.lock")) }

// LockIdle takes the monitor lock, waiting while it is held by somebody who will soon be done: a monitor that cleans up, a
// settler. It fails with ErrBusy when a monitor runs the container or is about to.
//
// It waits in flock(2), and looks at the state now and then: the holder may turn out to be a starting monitor, which keeps the lock for as
// long as the container runs.
func (s *Store) LockIdle(ctx context.Context, id string) (*disk.Lock, error) {
	l, err := s.Lock(id)
	if !errors.Is(err, ErrBusy) {
		return l, err
	}
	type result struct {
		l   *disk.Lock
		err error
	}
	got := make(chan result)
	waiting, leave := context.WithCancel(ctx)
	defer leave()
	go func() { // ends with this call; what waits in flock(2) then gives the lock back as soon as it has it
		l, err := disk.AcquireContext(waiting, s.RunDir(id, "monitor.lock"))
		select {
		case got <- result{l, err}:
		case <-waiting.Done():
			if l != nil {
				l.Release()
			}
		}
	}()
	look := time.NewTicker(lookAtHolder)
	defer look.Stop()
	for {
		st, err := s.State(id)
		if err != nil {
			return nil, err
		}
		if st != nil && st.BootID == disk.BootID() && (st.Status == Running || st.Status == Restarting) {
			return nil, ErrBusy
		}
		select {
		case r := <-got:
			if errors.Is(r.err, fs.ErrNotExist) { // somebody has removed the folder meanwhile
				return s.LockIdle(ctx, id)
			}
			if ctx.Err() == nil {
				return r.l, r.err
			}
			if r.l != nil {
				r.l.Release()
			}
		case <-look.C:
			continue
		case <-ctx.Done():
		}
		return nil, fmt.Errorf("wait for container %s: %w", short(id), ctx.Err())
	}
}

// lookAtHolder is how often LockIdle looks who it waits for.
const lookAtHolder = 5 * time.Millisecond

// Create publishes the record with its folders and its name, all or nothing. files are written beside config.json (they are the
// generated /etc/hosts and so on, by path within the folder). An existing name is ErrNameTaken. A nil error promises, unless
// the container is to be removed when it ends, that it survives a power loss.
func (s *Store) Create(r *Record, files map[string][]byte) error {
	if err := CheckName(r.Name); err != nil {
		return err
	}
	d := durability(r.HostConfig.AutoRemove)
	st, err := s.root.Stage()
	if err != nil {
		return err
	}
	defer st.Close()
	dir := filepath.Join(st.Dir, r.ID)
	for _, sub := range []string{"", "upper", "work", "log", "files"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			return fmt.Errorf("create container: %w", err)
		}
	}
	// The upper folder's own mode is that of the container's "/".
	if err := os.Chmod(filepath.Join(dir, "upper"), 0o755); err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	if r.Options.Project != 0 {
		size, err := StorageSize(r.HostConfig)
		if err != nil {
			return err
		}
		for _, sub := range []string{"upper", "work"} {
			if err := quota.Limit(filepath.Join(dir, sub), r.Options.Project, size); err != nil {
				return fmt.Errorf("create container: %w", err)
			}
		}
	}
	for name, data := range files {
		// No sync: their content is made anew at every start.
		if err := disk.WriteFile(filepath.Join(dir, name), data, 0o644, disk.Volatile); err != nil {
			return err
		}
	}
	if err := disk.WriteJSON(filepath.Join(dir, "config.json"), r, d); err != nil {
		return err
	}
	if err := s.publish(r, st); err != nil {
		return err
	}
	if err := st.Close(); err != nil { // before the sync, which holds up whoever changes folders beside it
		return err
	}
	if d == disk.Durable {
		if err := disk.SyncDir(s.root.Path("containers")); err != nil {
			return err
		}
		return disk.SyncDir(s.root.Path("names"))
	}
	return nil
}

// publish gives the staged folder its name and its place.
func (s *Store) publish(r *Record, st *disk.Stage) error {
	l, err := s.lockNames()
	if err != nil {
		return err
	}
	defer l.Release()
	// The name comes first: after a crash in between it leads nowhere, and such a link is free to take.
	if err := s.link(r.Name, r.ID); err != nil {
		return err
	}
	won, err := st.Publish(s.Dir(r.ID), r.ID)
	if err == nil && !won {
		err = fmt.Errorf("create container: %s exists already", r.ID)
	}
	if err != nil {
		os.Remove(s.root.Path("names", r.Name))
	}
	return err
}

// List returns the ids of all containers, in no order that means anything.
func (s *Store) List() ([]string, error) {
	entries, err := os.ReadDir(s.root.Path("containers"))
	if err != nil {
		return nil, fmt.Errorf("list containers: %w", err)
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		if isID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// ListRun returns the ids of all run folders: containers that ran since boot, some of which may be gone. What killed callers of RemoveRun left
// goes on the way.
func (s *Store) ListRun() ([]string, error) {
	dir := filepath.Join(s.state, "c")
	entries, err := os.ReadDir(dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, nil
		}
		return nil, fmt.Errorf("list run folders: %w", err)
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		if isID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids, disk.RemoveLeft(dir, entries)
}

// Resolve returns the id of the container that people mean: a full id, a name, or the beginning of an id, in this order, which is
// Docker's. A leading slash of a name is ignored.
func (s *Store) Resolve(nameOrID string) (string, error) {
	if nameOrID == "" {
		return "", errNoName
	}
	if isID(nameOrID) {
		if _, err := os.Lstat(s.Dir(nameOrID)); err == nil {
			return nameOrID, nil
		}
	}
	name := strings.TrimPrefix(nameOrID, "/")
	if CheckName(name) == nil {
		if id := s.named(name); id != "" {
			return id, nil
		}
	}
	if !isHex(nameOrID) {
		return "", &NotFoundError{nameOrID}
	}
	ids, err := s.List()
	if err != nil {
		return "", err
	}
	found := ""
	for _, id := range ids {
		if !strings.HasPrefix(id, nameOrID) {
			continue
		}
		if found != "" {
			return "", fmt.Errorf("%w: multiple IDs found with provided prefix: %s", ErrAmbiguous, nameOrID)
		}
		found = id
	}
	if found == "" {
		return "", &NotFoundError{nameOrID}
	}
	return found, nil
}

// Rename gives the container another name. An existing name is ErrNameTaken. After a crash half-way the container has one of
// the two names, and the other is free.
func (s *Store) Rename(id, name string) error {
	name = strings.TrimPrefix(name, "/")
	if err := CheckName(name); err != nil {
		return err
	}
	l, err := s.lockNames()
	if err != nil {
		return err
	}
	defer l.Release()
	r, err := s.Load(id)
	if err != nil {
		return err
	}
	old := r.Name
	if old == name {
		return sameNameError{}
	}
	if err := s.link(name, id); err != nil {
		return err
	}
	r.Name = name
	if err := disk.WriteJSON(s.Dir(id, "config.json"), r, durability(r.HostConfig.AutoRemove)); err != nil {
		os.Remove(s.root.Path("names", name))
		return err
	}
	return os.Remove(s.root.Path("names", old))
}

// Remove makes the container disappear: its folder moves into the trash, its name is free. The caller holds the monitor lock
// and deletes the returned folder, "" if there was none, when it has the time. Idempotent.
func (s *Store) Remove(id string) (trash string, err error) {
	l, err := s.lockNames()
	if err != nil {
		return "", err
	}
	defer l.Release()
	name := ""
	if r, err := s.Load(id); err == nil {
		name = r.Name
	}
	trash, err = s.root.TrashLater(s.Dir(id))
	if err != nil {
		return "", err
	}
	if name != "" {
		if to, err := os.Readlink(s.root.Path("names", name)); err == nil && to == id {
			if err := os.Remove(s.root.Path("names", name)); err != nil {
				return trash, fmt.Errorf("release name %s: %w", name, err)
			}
		}
	}
	return trash, nil
}

// RemoveRun deletes the run folder. The caller holds the monitor lock, which this ends the meaning of: the next one is another file's.
func (s *Store) RemoveRun(id string) error { return disk.RemoveLocked(s.RunDir(id)) }

func (s *Store) lockNames() (*disk.Lock, error) { return disk.Acquire(s.root.Path("names.lock")) }

// named returns the id behind a name, "" when there is none.
func (s *Store) named(name string) string {
	id, err := os.Readlink(s.root.Path("names", name))
	if err != nil || !isID(id) {
		return ""
	}
	var r struct { // of the record
		Name string `json:"name"`
	}
	if err := disk.ReadJSON(s.Dir(id, "config.json"), &r); err != nil || r.Name != name {
		return ""
	}
	return id
}

// Named reports whether a container has a name.
func (s *Store) Named(name string) bool { return CheckName(name) == nil && s.named(name) != "" }

// link makes names/<name>. A link that leads nowhere, or to a container that has been renamed, is replaced. The caller holds
// names.lock.
func (s *Store) link(name, id string) error {
	path := s.root.Path("names", name)
	err := os.Symlink(id, path)
	if errors.Is(err, fs.ErrExist) {
		if holder := s.named(name); holder != "" {
			return &NameTakenError{name, holder}
		}
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("reclaim name %s: %w", name, err)
		}
		err = os.Symlink(id, path)
	}
	if err != nil {
		return fmt.Errorf("take name %s: %w", name, err)
	}
	return nil
}

func isHex(s string) bool {
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return s != ""
}

func isID(s string) bool { return len(s) == 64 && isHex(s) }

func short(id string) string { return id[:min(12, len(id))] }

// Names reads names/: for each link the id that it leads to, "" for what is no link. It changes nothing.
func (s *Store) Names() (map[string]string, error) {
	entries, err := os.ReadDir(s.root.Path("names"))
	if err != nil {
		return nil, fmt.Errorf("list names: %w", err)
	}
	names := make(map[string]string, len(entries))
	for _, e := range entries {
		to, err := os.Readlink(s.root.Path("names", e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			to = ""
		}
		names[e.Name()] = to
	}
	return names, nil
}

// StaleNames lists the links that lead to no container of that name, and which containers have no link for their name. Nobody can
// change a name meanwhile.
func (s *Store) StaleNames() (links []string, nameless []*Record, err error) {
	l, err := s.lockNames()
	if err != nil {
		return nil, nil, err
	}
	defer l.Release()
	names, err := s.Names()
	if err != nil {
		return nil, nil, err
	}
	ids, err := s.List()
	if err != nil {
		return nil, nil, err
	}
	owner := map[string]string{}
	for _, id := range ids {
		r, err := s.Load(id)
		if err != nil {
			continue //nolint:nilerr // nothing is known of it; who reads the record says so
		}
		owner[r.Name] = id
		if names[r.Name] != id {
			nameless = append(nameless, r)
		}
	}
	for name, to := range names {
		if to == "" || owner[name] != to {
			links = append(links, name)
		}
	}
	return links, nameless, nil
}

// MendName links a container's name to it again, or removes a link that leads to no container of that name.
func (s *Store) MendName(name, id string) error {
	l, err := s.lockNames()
	if err != nil {
		return err
	}
	defer l.Release()
	if id != "" {
		return s.link(name, id)
	}
	if s.named(name) != "" {
		return nil // taken meanwhile
	}
	if err := os.Remove(s.root.Path("names", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release name %s: %w", name, err)
	}
	return nil
}

// ClearNames removes the links that a creator killed between name and container has left: they lead nowhere.
func (s *Store) ClearNames() error {
	l, err := s.lockNames()
	if err != nil {
		return err
	}
	defer l.Release()
	names, err := s.Names()
	if err != nil {
		return err
	}
	for name, id := range names {
		if _, err := os.Lstat(s.Dir(id)); id == "" || !errors.Is(err, fs.ErrNotExist) {
			continue // no link of ours, or one that leads somewhere
		}
		if err := os.Remove(s.root.Path("names", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("release name %s: %w", name, err)
		}
	}
	return nil
}
