package logs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// format is one of the two ways to write files.
type format struct {
	// suffix is that of a file's name, packed that of a compressed one.
	suffix, packed string
	// link is the name of the link to the file that is being written.
	link string
	// pack copies a full file, compressed.
	pack func(out io.Writer, in *os.File, stop <-chan struct{}) error
}

var (
	jsonFormat  = format{suffix: ".json", packed: ".json.gz", link: "json.log", pack: packJSON}
	localFormat = format{suffix: ".log", packed: ".log.zst", link: "local.log", pack: packLocal}
)

// formats are all that a folder may hold: the default was another one once, and a container keeps its log.
var formats = []*format{&localFormat, &jsonFormat}

// tmpSuffix marks a compressed file that isn't complete.
const tmpSuffix = ".tmp"

func fileName(dir string, seq uint64, suffix string) string {
	return filepath.Join(dir, fmt.Sprintf("%08d%s", seq, suffix))
}

// sequence lists the numbers of a log's files, lowest first, each once. A folder that isn't there has none.
func sequence(dir string) ([]uint64, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list log: %w", err)
	}
	var seqs []uint64
	for _, e := range entries {
		num, rest, _ := strings.Cut(e.Name(), ".")
		n, err := strconv.ParseUint(num, 10, 64)
		if err == nil && slices.ContainsFunc(formats, func(f *format) bool { return "."+rest == f.suffix || "."+rest == f.packed }) {
			seqs = append(seqs, n)
		}
	}
	slices.Sort(seqs)
	return slices.Compact(seqs), nil
}

// CurrentPath is where the current file of a log of the driver json-file is found: inspect's LogPath.
func CurrentPath(dir string) string { return filepath.Join(dir, jsonFormat.link) }

// folder is the side of a writer that has to do with files: it begins new ones, and removes or compresses old ones.
type folder struct {
	dir    string
	format *format
	o      FileOptions

	f    *os.File
	seq  uint64
	size int64
	// packer compresses full files some time after there was a new one; nil without compression.
	packer *packer
	// background is the first error of removing old files.
	background error
}

// openFolder opens the file to go on with, which may be new.
func openFolder(dir string, f *format, o FileOptions) (*folder, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	seqs, err := sequence(dir)
	if err != nil {
		return nil, err
	}
	d := &folder{dir: dir, format: f, o: o, seq: 1}
	if len(seqs) > 0 {
		d.seq = seqs[len(seqs)-1]
		if _, err := os.Lstat(fileName(dir, d.seq, f.suffix)); err != nil { // compressed, or of another format
			d.seq++
		}
	}
	if o.Compress && o.MaxSize >= 0 {
		d.packer = &packer{dir: dir, stop: make(chan struct{})}
	}
	return d, d.open()
}

// open begins or goes on with the file of the current number.
func (d *folder) open() error {
	f, err := os.OpenFile(fileName(d.dir, d.seq, d.format.suffix), os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open log: %w", errors.Join(err, f.Close()))
	}
	// The link is for people and tools, and tells followers of the log's end; replacing it is atomic.
	link, tmp := filepath.Join(d.dir, d.format.link), filepath.Join(d.dir, "."+d.format.link)
	target := filepath.Base(f.Name())
	if old, err := os.Readlink(link); err != nil || old != target {
		os.Remove(tmp) // left by a writer that died here
		err = os.Symlink(target, tmp)
		if err == nil {
			err = os.Rename(tmp, link)
		}
		if err != nil {
			return fmt.Errorf("open log: %w", errors.Join(err, f.Close()))
		}
	}
	d.f, d.size = f, size
	return nil
}

// rotate begins the next file. On an error the old one is gone on with.
func (d *folder) rotate() error {
	old := d.f
	d.seq++
	if err := d.open(); err != nil {
		d.seq--
		return err
	}
	err := old.Close()
	d.tidy()
	return err
}

// tidy removes the files that are too many and lets full ones be compressed.
func (d *folder) tidy() {
	seqs, err := sequence(d.dir)
	if err != nil {
		d.background = errors.Join(d.background, err)
		return
	}
	var errs []error
	for ; len(seqs) > d.o.MaxFile; seqs = seqs[1:] {
		for _, f := range formats {
			for _, s := range []string{f.suffix, f.packed, f.packed + tmpSuffix} {
				if err := os.Remove(fileName(d.dir, seqs[0], s)); err != nil && !errors.Is(err, os.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	if err := errors.Join(errs...); err != nil && d.background == nil {
		d.background = fmt.Errorf("bound log: %w", err)
	}
	if d.packer != nil && len(seqs) > 1 {
		d.packer.soon()
	}
}

// close closes the file. It doesn't wait for compression: Compress does the rest.
func (d *folder) close() error {
	err := d.f.Close()
	d.f = nil
	if d.packer != nil {
		err = errors.Join(err, d.packer.end())
	}
	return errors.Join(err, d.background)
}

// quiet is how long no file must have become full before full ones are compressed: a flood of output would wait for it, and much of
// what is compressed would be thrown away a moment later.
const quiet = time.Second

// packer compresses full files in the background.
type packer struct {
	dir   string
	stop  chan struct{}
	timer *time.Timer // used by the writer alone
	// work is held by who compresses; err is the first error.
	work sync.Mutex
	err  error
}

// soon asks for a look when there has been quiet.
func (p *packer) soon() {
	if p.timer == nil {
		p.timer = time.AfterFunc(quiet, p.run)
	} else {
		p.timer.Reset(quiet)
	}
}

// run compresses what there is, below everything else that the machine has to do.
func (p *packer) run() {
	p.work.Lock()
	defer p.work.Unlock()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine, and its priority with it
		_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 19)
		done <- pack(p.dir, p.stop)
	}()
	if err := <-done; err != nil && p.err == nil {
		p.err = err
	}
	debug.FreeOSMemory()
}

// end stops it and waits for what is under way, a block at the most.
func (p *packer) end() error {
	if p.timer != nil {
		p.timer.Stop()
	}
	close(p.stop)
	p.work.Lock()
	defer p.work.Unlock()
	return p.err
}

// Compress compresses the full files of a log that nobody writes any more, if its options want it: what a short life of its writer left.
// A writer that begins meanwhile doesn't mind.
func Compress(dir string, o Options) error {
	files := o.Files
	if o.Driver != Local && o.Driver != JSONFile && !o.Cached() || !files.Compress || files.MaxSize < 0 {
		return nil
	}
	return pack(dir, nil)
}

// pack compresses all files but the newest, until stop is closed. It does nothing while somebody else does it.
func pack(dir string, stop <-chan struct{}) error {
	lock, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("compress log: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil
		}
		return fmt.Errorf("compress log: %w", err)
	}
	defer unix.Flock(int(lock.Fd()), unix.LOCK_UN) // a child that is being forked has a copy of the file until it executes
	seqs, err := sequence(dir)
	if err != nil || len(seqs) < 2 {
		return err
	}
	var errs []error
	for _, seq := range seqs[:len(seqs)-1] {
		for _, f := range formats {
			if err := packFile(dir, seq, f, stop); errors.Is(err, errStopped) {
				return errors.Join(errs...)
			} else if err != nil {
				errs = append(errs, fmt.Errorf("compress log: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

var errStopped = errors.New("stopped")

// packFile replaces a full file by a compressed one, which appears whole or not at all and has the old one's time of last change.
// If both are there, the compressed one is whole.
func packFile(dir string, seq uint64, f *format, stop <-chan struct{}) error {
	plain, packed := fileName(dir, seq, f.suffix), fileName(dir, seq, f.packed)
	in, err := os.Open(plain)
	if errors.Is(err, os.ErrNotExist) {
		return nil // compressed already, or of another format
	}
	if err != nil {
		return err
	}
	defer in.Close()
	if _, err := os.Lstat(packed); err == nil {
		return os.Remove(plain)
	}
	st, err := in.Stat()
	if err != nil {
		return err
	}
	tmp := packed + tmpSuffix
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = f.pack(out, in, stop)
	if err == nil {
		err = out.Sync() // the plain one goes
	}
	if cerr := out.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Chtimes(tmp, st.ModTime(), st.ModTime())
	}
	if err == nil {
		err = os.Rename(tmp, packed)
	}
	if err != nil {
		os.Remove(tmp)
		if errors.Is(err, os.ErrNotExist) {
			return nil // there were too many files meanwhile, and this one is gone
		}
		return err
	}
	err = os.Remove(plain)
	if errors.Is(err, os.ErrNotExist) {
		err = os.Remove(packed) // the same
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// stopper ends a copy when its channel is closed.
type stopper struct {
	r    io.Reader
	stop <-chan struct{}
}

func (s *stopper) Read(p []byte) (int, error) {
	select {
	case <-s.stop:
		return 0, errStopped
	default:
		return s.r.Read(p)
	}
}
