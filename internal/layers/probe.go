package layers

import (
	"archive/tar"
	"fmt"
	"os"
	"path/filepath"

	"conex/internal/disk"
	"conex/internal/layertar"

	"golang.org/x/sys/unix"
)

// probed is <state>/layers/driver.json: what the kernel can do, good for one boot and one root.
type probed struct {
	Boot   string `json:"boot"`
	Root   string `json:"root"`
	UID    int    `json:"uid"`
	Driver string `json:"driver"`
	Why    string `json:"why"`
}

// probe finds the best driver, by trying.
func (s *Store) probe() (probed, error) {
	path := filepath.Join(s.state, "driver.json")
	want := probed{Boot: disk.BootID(), Root: s.root.Path(), UID: os.Geteuid()}
	var p probed
	if err := disk.ReadJSON(path, &p); err == nil && p.Boot == want.Boot && p.Root == want.Root && p.UID == want.UID {
		return p, nil
	}
	p = want
	if err := s.tryEROFS(); err != nil {
		p.Driver, p.Why = DriverDir, fmt.Sprintf("EROFS from a file is not possible here (%v)", err)
	} else {
		p.Driver, p.Why = DriverEROFS, "the kernel mounts EROFS from a file"
	}
	return p, disk.WriteJSON(path, p, disk.Volatile)
}

// tryEROFS mounts a tiny image that lies where layers lie, detached, and reads from it.
func (s *Store) tryEROFS() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("it takes root, this is user %d", os.Geteuid())
	}
	st, err := s.root.Stage()
	if err != nil {
		return err
	}
	defer st.Close() // the sweeper removes what this can't
	t := layertar.NewTree()
	if _, err := t.Add(&tar.Header{Name: "probe/", Typeflag: tar.TypeDir, Mode: 0o755}, 0); err != nil {
		return err
	}
	t.Finish()
	index := filepath.Join(st.Dir, "index.erofs")
	if _, err := writeIndex(index, content{tree: t}); err != nil {
		return err
	}
	m, err := openIndex(index, nil)
	if err != nil {
		var u unix.Utsname
		if uerr := unix.Uname(&u); uerr == nil {
			return fmt.Errorf("%w; Linux %s, needed is 6.12 with CONFIG_EROFS_FS_BACKED_BY_FILE", err, unix.ByteSliceToString(u.Release[:]))
		}
		return err
	}
	defer m.Close()
	var stat unix.Stat_t
	if err := unix.Fstatat(int(m.Fd()), "probe", &stat, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("read a mounted image: %w", err)
	}
	return nil
}
