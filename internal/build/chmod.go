package build

import (
	"fmt"
	"strconv"
	"strings"
)

// modeChange gives the mode of a file, or of a folder, whose mode was another.
type modeChange func(mode int64, dir bool) int64

// parseChmod reads --chmod's value as chmod(1) does: an octal number, or clauses like "u+x,go-w,a=rX".
func parseChmod(s string) (modeChange, error) {
	if n, err := strconv.ParseUint(s, 8, 32); err == nil && n <= 0o7777 {
		return func(int64, bool) int64 { return int64(n) }, nil
	}
	var steps []modeChange
	for clause := range strings.SplitSeq(s, ",") {
		i := strings.IndexAny(clause, "+-=")
		if i < 0 || strings.Trim(clause[:i], "ugoa") != "" {
			return nil, badChmod(s)
		}
		who := clause[:i]
		for rest := clause[i:]; rest != ""; {
			op := rest[0]
			end := strings.IndexAny(rest[1:], "+-=") + 1
			if end == 0 {
				end = len(rest)
			}
			perms := rest[1:end]
			rest = rest[end:]
			if strings.Trim(perms, "rwxXst") != "" && (len(perms) != 1 || !strings.Contains("ugo", perms)) {
				return nil, badChmod(s)
			}
			steps = append(steps, func(mode int64, dir bool) int64 { return changeMode(mode, dir, who, op, perms) })
		}
	}
	return func(mode int64, dir bool) int64 {
		for _, step := range steps {
			mode = step(mode, dir)
		}
		return mode
	}, nil
}

func badChmod(s string) error {
	return fmt.Errorf("invalid chmod parameter: '%s'. it should be octal string and between 0 and 07777, or symbolic as in u+x,go-w", s)
}

// changeMode applies one clause. Without a who it means all: there is no umask in a build.
func changeMode(mode int64, dir bool, who string, op byte, perms string) int64 {
	if who == "" || strings.Contains(who, "a") {
		who = "ugo"
	}
	var reach, set int64 // the bits the clause may touch, and those it names
	for _, class := range []struct {
		name           string
		shift, special int64
	}{{"u", 6, 0o4000}, {"g", 3, 0o2000}, {"o", 0, 0}} {
		if !strings.Contains(who, class.name) {
			continue
		}
		reach |= 7<<class.shift | class.special
		for _, p := range perms {
			var bits int64
			switch p {
			case 'r':
				bits = 4
			case 'w':
				bits = 2
			case 'x':
				bits = 1
			case 'X':
				if dir || mode&0o111 != 0 {
					bits = 1
				}
			case 's':
				set |= class.special
			case 'u':
				bits = mode >> 6 & 7
			case 'g':
				bits = mode >> 3 & 7
			case 'o':
				bits = mode & 7
			}
			set |= bits << class.shift
		}
	}
	if who == "ugo" && strings.Contains(perms, "t") {
		set |= 0o1000
	}
	switch op {
	case '+':
		return mode | set
	case '-':
		return mode &^ set
	}
	if dir { // chmod(1) keeps a folder's set-id bits unless they are named
		reach &^= 0o6000
	}
	return mode&^reach | set
}
