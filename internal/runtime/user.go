package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"conex/internal/safepath"

	"golang.org/x/sys/unix"
)

// User is a resolved user[:group].
type User struct {
	UID, GID uint32
	// Groups are the supplementary groups, from the group file and groupAdd.
	Groups []uint32
	// Home is the home folder from the passwd file; "/" when it is not listed.
	Home string
}

// maxAccounts bounds a passwd or group file, which the image's maker wrote, in bytes; maxEntries in lines.
const (
	maxAccounts = 8 << 20
	maxEntries  = 1 << 16
)

// ResolveUser looks user ("name", "uid", "name:group", "uid:gid"; empty is root) up in the passwd and group files below root,
// by Docker's rules: a number needs no entry, a name does. groupAdd are further groups by name or number.
func ResolveUser(root *os.File, user string, groupAdd []string) (User, error) {
	passwd, err := accounts(root, "etc/passwd")
	if err != nil {
		return User{}, err
	}
	group, err := accounts(root, "etc/group")
	if err != nil {
		return User{}, err
	}
	name, groupName, hasGroup := strings.Cut(user, ":")
	if name == "" {
		name = "0"
	}
	u := User{Home: "/"}
	entry := lookup(passwd, name, 2)
	var login string
	switch {
	case len(entry) >= 4:
		login = entry[0]
		uid, err1 := parseID(entry[2])
		gid, err2 := parseID(entry[3])
		if err := errors.Join(err1, err2); err != nil {
			return User{}, fmt.Errorf("user %s: passwd entry: %w", name, err)
		}
		u.UID, u.GID = uid, gid
		if len(entry) > 5 && entry[5] != "" {
			u.Home = entry[5]
		}
	default:
		id, err := parseID(name)
		if err != nil {
			if _, err := strconv.ParseInt(name, 10, 64); err == nil {
				return User{}, fmt.Errorf("user %s: uids and gids must be in range 0-2147483647", name)
			}
			return User{}, fmt.Errorf("unable to find user %s: no matching entries in passwd file", name)
		}
		u.UID = id
	}
	if hasGroup && groupName != "" {
		gid, err := resolveGroup(group, groupName)
		if err != nil {
			return User{}, err
		}
		u.GID = gid
	} else if login != "" {
		for _, g := range group {
			if len(g) < 4 || !member(g[3], login) {
				continue
			}
			if gid, err := parseID(g[2]); err == nil {
				u.Groups = append(u.Groups, gid)
			}
		}
	}
	for _, g := range groupAdd {
		gid, err := resolveGroup(group, g)
		if err != nil {
			return User{}, err
		}
		u.Groups = append(u.Groups, gid)
	}
	// The group itself too: a process with setuid helpers could otherwise shed it and gain what is denied to it (CVE-2022-36109).
	u.Groups = append(u.Groups, u.GID)
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	return u, nil
}

// member reports whether login is in a group's list of members.
func member(list, login string) bool {
	for m := range strings.SplitSeq(list, ",") {
		if m == login {
			return true
		}
	}
	return false
}

func resolveGroup(group [][]string, name string) (uint32, error) {
	if g := lookup(group, name, 2); g != nil {
		return parseID(g[2])
	}
	id, err := parseID(name)
	if err != nil {
		return 0, fmt.Errorf("unable to find group %s: no matching entries in group file", name)
	}
	return id, nil
}

// lookup finds an entry by name, or failing that by the number in field id.
func lookup(entries [][]string, key string, id int) []string {
	for _, e := range entries {
		if len(e) > id && e[0] == key {
			return e
		}
	}
	n, err := parseID(key)
	if err != nil {
		return nil
	}
	for _, e := range entries {
		if len(e) > id {
			if v, err := parseID(e[id]); err == nil && v == n {
				return e
			}
		}
	}
	return nil
}

// parseID reads a user or group number; the range is the kernel's signed one, as Docker has it.
func parseID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 31)
	if err != nil {
		return 0, fmt.Errorf("id %q is not a number from 0 to %d", s, uint32(1)<<31-1)
	}
	return uint32(n), nil
}

// accounts reads a passwd-like file; a missing one is empty.
func accounts(root *os.File, path string) ([][]string, error) {
	data, err := safepath.ReadFile(root, path, maxAccounts)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the container's %s: %w", path, err)
	}
	var out [][]string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		// As many fields as passwd(5) has: a line of colons must not become millions of strings.
		out = append(out, strings.SplitN(line, ":", 7))
		if len(out) > maxEntries {
			return nil, fmt.Errorf("read the container's %s: more than %d entries", path, maxEntries)
		}
	}
	return out, nil
}
