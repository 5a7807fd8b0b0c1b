package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"conex/internal/blobs"
	"conex/internal/build"
	"conex/internal/disk"
	"conex/internal/image"
	"conex/internal/layers"
	"conex/internal/ocispec"

	"golang.org/x/sys/unix"
)

// How bad a finding is.
const (
	// Damaged is what is lost, wrong or can't be read.
	Damaged = "damaged"
	// Orphan is a file below the root that is not conex's.
	Orphan = "orphan"
	// Leftover is what a process that died has left, or nothing needs any more. It does no harm, and the next pull, build or prune clears
	// it: a store with nothing else is clean.
	Leftover = "leftover"
)

// CheckRequest asks for a look at everything below the root.
type CheckRequest struct {
	// Repair mends what can be: see Check.
	Repair bool
	// Progress is told how many of the bytes to verify are read. It may be called by several goroutines, one at a time.
	Progress func(done, total int64)
}

// Finding is one thing that is not as it should be.
type Finding struct {
	// Severity is Damaged, Orphan or Leftover.
	Severity string
	// Kind says what it is ("layer", "image", "container" ...), Name which.
	Kind, Name string
	// Problem says what is wrong and what that means, Advice what to do about it.
	Problem, Advice string
	// Repaired says what a repair did, RepairError why it could not.
	Repaired    string `json:",omitempty"`
	RepairError string `json:",omitempty"`

	// fix mends it and says how.
	fix func(ctx context.Context) (string, error)
	// image is the image to fetch again.
	image ocispec.Digest
}

// CheckReport is what a check found.
type CheckReport struct {
	Findings []Finding
	// What was looked at; Bytes were read and hashed.
	Layers, Blobs, Images, Containers, Volumes int
	Bytes                                      int64
}

// Clean reports whether nothing is wrong: leftovers don't count, nor does what was repaired.
func (r CheckReport) Clean() bool {
	for _, f := range r.Findings {
		if f.Severity != Leftover && f.Repaired == "" {
			return false
		}
	}
	return true
}

// Check verifies every blob and layer against its digest, reads every record and follows every reference. It may run beside everything
// else: what it reports was looked at twice, the second time while nobody could change it. Without Repair nothing is changed.
//
// With Repair the index of a layer is made anew from its tar; layers, configs and manifests that are damaged or lost are fetched again if
// a digest in a repository says where; names and modes are set right; leftovers are removed. What can't be mended and what is not conex's
// moves into the folder quarantine/. Data of containers and volumes is never touched.
func (e *Engine) Check(ctx context.Context, req CheckRequest) (CheckReport, error) {
	c := &checker{e: e, req: req, lost: map[ocispec.Digest]string{}}
	var err error
	if c.images, err = e.Images(); err != nil {
		return c.report, err
	}
	if c.layers, err = e.Layers(); err != nil {
		return c.report, err
	}
	for _, step := range []func(context.Context) error{c.folders, c.strays, c.contents, c.references, c.names, c.leftovers} {
		if err := step(ctx); err != nil {
			return c.report, err
		}
	}
	rank := []string{Damaged, Orphan, Leftover}
	slices.SortStableFunc(c.report.Findings, func(a, b Finding) int {
		return slices.Index(rank, a.Severity) - slices.Index(rank, b.Severity)
	})
	if req.Repair {
		err = c.repair(ctx)
	}
	return c.report, err
}

// checker is a check at work.
type checker struct {
	e      *Engine
	req    CheckRequest
	images *image.Store
	layers *layers.Store
	report CheckReport
	mu     sync.Mutex
	// lost are layers that are damaged, and why.
	lost map[ocispec.Digest]string
}

func (c *checker) add(f Finding) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.Findings = append(c.report.Findings, f)
}

// short names a digest for people.
func shortName(d ocispec.Digest) string {
	if ocispec.Validate(d) != nil {
		return fmt.Sprintf("%q", string(d))
	}
	return shortDigest(d)
}

const repairs = "conex system check --repair "

// folders looks at the root's own folders: others on this machine must not get in.
func (c *checker) folders(context.Context) error {
	for _, name := range append([]string{""}, disk.Folders...) {
		path := c.e.root.Path(name)
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return fmt.Errorf("check %s: %w", path, err)
		}
		f := Finding{Severity: Damaged, Kind: "folder", Name: path, Advice: repairs + "sets it right"}
		mode := st.Mode & 0o7777
		bad := uint32(0o077)
		if name == "" {
			bad = 0o022 // it may be anybody's to look at, the folders in it are not
		}
		switch {
		case st.Mode&unix.S_IFMT != unix.S_IFDIR:
			f.Problem, f.Advice = "it is no folder", "move it away: the next command makes the folder"
		case int(st.Uid) != os.Geteuid():
			f.Problem = fmt.Sprintf("it belongs to user %d, who can change what containers run", st.Uid)
			f.fix = func(context.Context) (string, error) {
				return "it belongs to us again", os.Chown(path, os.Geteuid(), os.Getegid())
			}
		case mode&bad != 0:
			f.Problem = fmt.Sprintf("its mode is %04o: other users of this machine reach the images' set-user-id programs", mode)
			f.fix = func(context.Context) (string, error) {
				return "its mode is set", os.Chmod(path, os.FileMode(mode&^bad))
			}
		default:
			continue
		}
		c.add(f)
	}
	return nil
}

// contents hashes all layers and blobs, several at a time.
func (c *checker) contents(ctx context.Context) error {
	type job struct {
		size int64
		run  func(ctx context.Context) error
	}
	var jobs []job
	entries, err := os.ReadDir(c.e.root.Path("layers"))
	if err != nil {
		return err
	}
	users := c.users()
	for _, d := range entries {
		id := ocispec.Digest("sha256:" + d.Name())
		if ocispec.Validate(id) != nil {
			continue
		}
		info, err := c.layers.Peek(id)
		if err != nil {
			info.Size = 0 // damaged, which the check says, or just removed
		}
		c.report.Layers++
		jobs = append(jobs, job{info.Size, func(ctx context.Context) error { return c.layer(ctx, id, users[id]) }})
	}
	all, err := c.e.Blobs().List()
	if err != nil {
		return err
	}
	for _, d := range all {
		size, err := c.e.Blobs().Size(d)
		if errors.Is(err, blobs.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		c.report.Blobs++
		jobs = append(jobs, job{size, func(ctx context.Context) error { return c.blob(ctx, d, users[d]) }})
	}
	var total, done int64
	for _, j := range jobs {
		total += j.size
	}
	// The large ones first: at the end nobody waits for one.
	slices.SortStableFunc(jobs, func(a, b job) int { return int(min(max(b.size-a.size, -1), 1)) })
	return parallel(ctx, jobs, func(ctx context.Context, j job) error {
		if err := j.run(ctx); err != nil {
			return err
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		done += j.size
		c.report.Bytes = done
		if c.req.Progress != nil {
			c.req.Progress(done, total)
		}
		return nil
	})
}

// users says of each digest for people which images and containers need it.
func (c *checker) users() map[ocispec.Digest]string {
	m := map[ocispec.Digest][]string{}
	add := func(who string, ds ...ocispec.Digest) {
		for _, d := range ds {
			if !slices.Contains(m[d], who) {
				m[d] = append(m[d], who)
			}
		}
	}
	list, _ := c.images.List() // what is wrong with an image is found below
	for _, img := range list {
		name := "image " + shortDigest(img.ID)
		if len(img.RepoTags) > 0 {
			name = "image " + img.RepoTags[0]
		}
		add(name, append([]ocispec.Digest{img.ID, img.Manifest}, img.Layers()...)...)
	}
	ids, _ := c.e.Containers().List()
	for _, id := range ids {
		if r, err := c.e.Containers().Load(id); err == nil {
			_, layers := r.Digests()
			add("container "+r.Name, layers...)
		}
	}
	out := map[ocispec.Digest]string{}
	for d, who := range m {
		slices.Sort(who)
		if len(who) > 3 {
			who = append(who[:3:3], fmt.Sprintf("%d more", len(who)-3))
		}
		out[d] = strings.Join(who, ", ")
	}
	return out
}

func (c *checker) layer(ctx context.Context, id ocispec.Digest, users string) error {
	fault, err := c.layers.Check(ctx, id)
	if err != nil || fault == nil {
		return err
	}
	f := Finding{Severity: Damaged, Kind: "layer", Name: string(id), Problem: fault.Err.Error()}
	if users != "" {
		f.Problem += "; used by " + users
	}
	if fault.Mendable {
		f.Problem += "; its tar is good"
		f.Advice = repairs + "makes the rest anew from it"
		f.fix = func(ctx context.Context) (string, error) { return "made anew from its tar", c.layers.Mend(ctx, id) }
		c.add(f)
		return nil
	}
	f.Advice = repairs + "puts it into quarantine and fetches it again if a registry is known to have it"
	f.fix = func(ctx context.Context) (string, error) {
		to, err := c.quarantine("layer-" + id.Encoded())
		if err != nil {
			return "", err
		}
		moved, err := c.layers.Quarantine(ctx, id, to)
		if err != nil || !moved {
			return "it is whole, or gone", err
		}
		return "moved to " + to, nil
	}
	c.mu.Lock()
	c.lost[id] = "is damaged"
	c.mu.Unlock()
	c.add(f)
	return nil
}

func (c *checker) blob(ctx context.Context, d ocispec.Digest, users string) error {
	err := c.e.Blobs().Check(ctx, d)
	if err == nil || errors.Is(err, blobs.ErrNotFound) {
		return nil
	}
	if !errors.Is(err, blobs.ErrMismatch) {
		return err
	}
	f := Finding{Severity: Damaged, Kind: "blob", Name: string(d), Problem: "its content does not have this digest"}
	if users != "" {
		f.Problem += "; used by " + users
	}
	f.Advice = repairs + "puts it into quarantine and fetches it again if it is needed"
	f.fix = func(ctx context.Context) (string, error) {
		if c.e.Blobs().Check(ctx, d) == nil {
			return "it is whole", nil // replaced meanwhile
		}
		return c.moveAway(c.e.root.Path("blobs", "sha256", d.Encoded()), "blob-"+d.Encoded())
	}
	c.mu.Lock()
	c.lost[d] = "is damaged"
	c.mu.Unlock()
	c.add(f)
	return nil
}

// leftovers looks for what dead processes have left.
func (c *checker) leftovers(ctx context.Context) error {
	sweep := func(ctx context.Context) (string, error) {
		_, err := c.e.sweep(ctx)
		return "removed", err
	}
	dead, err := c.e.root.Leftovers()
	if err != nil {
		return err
	}
	leases, err := deadLeases(c.e.root)
	if err != nil {
		return err
	}
	for _, p := range append(dead, leases...) {
		c.add(Finding{Severity: Leftover, Kind: "file", Name: p, Problem: "its process has died, or a deletion was cut short",
			Advice: "the next pull, build or prune removes it", fix: sweep})
	}
	entries, err := build.Entries(c.e.root, &disk.Meter{})
	if err != nil {
		return err
	}
	for _, en := range entries {
		f := Finding{Severity: Leftover, Kind: "cached step", Name: en.ID, Advice: "nothing: the step runs again when it is needed"}
		_, lerr := c.layers.Peek(en.Layer)
		switch {
		case en.Kind == build.KindDamaged:
			f.Problem = "its record can't be read"
		case en.Layer != "" && (errors.Is(lerr, layers.ErrNotFound) || c.lost[en.Layer] != ""):
			f.Problem = fmt.Sprintf("its layer %s is damaged or gone", shortName(en.Layer))
		default:
			continue
		}
		f.fix = func(context.Context) (string, error) {
			_, err := build.Forget(c.e.root, en)
			return "forgotten", err
		}
		c.add(f)
	}
	for _, p := range c.temporaries() {
		c.add(Finding{Severity: Leftover, Kind: "file", Name: p, Problem: "a record that was being written when its process died", Advice: repairs + "removes it",
			fix: func(context.Context) (string, error) { return "removed", os.Remove(p) }})
	}
	return ctx.Err()
}

// stale is the age from which a temporary file has surely nobody any more who writes it.
const stale = 10 * time.Minute
