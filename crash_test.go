package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// You may skip this file at first. Its tests let everything fail that can: FILE is
// damaged, the power is lost, an operation on the disk fails, the server is killed.
// Nothing that was acknowledged may be lost, and nobody may see what is not on disk.
//
// A fakeDisk is called before each file operation (see the type disk in store.go). It
// runs the operation, and remembers two versions of each file: what was written, and
// what was fsynced; and two versions of the directory: with and without the renames
// that were not fsynced. So a test can ask at any time for the files that a crash
// would leave now, and open a store on them: after a kill, all that was written is
// there; after a loss of power, only what was fsynced, or also a part of the rest. A
// test can also let the disk return an error, after an operation without effect, with
// half of its effect, or with all of it.

// TestFileCutAnywhere opens every prefix of FILE. Each holds its whole commits, and
// no part of the next.
func TestFileCutAnywhere(t *testing.T) {
	t.Parallel()
	values, states := example(t)
	file, inSnapshot := strings.Join(values, ""), strings.Count(values[0], "\n")
	path, next, snapshot := scratch(t), scratch(t), len(values[0])-1 // without its line end
	for cut := range len(file) + 1 {
		name, prefix := fmt.Sprintf("cut at byte %d", cut), files{dataName: file[:cut]}
		if cut < snapshot {
			prefix.rejected(t, path, name, "")
			continue
		}
		lines, torn := max(strings.Count(file[:cut], "\n"), inSnapshot), 0
		if cut < len(file) && file[cut] == '\n' {
			lines = strings.Count(file[:cut], "\n") + 1 // only the line end is missing
		} else if cut > snapshot && file[cut-1] != '\n' {
			torn = lines + 1
		}
		prefix.write(t, path)
		s := openTestStore(t, path, noSync)
		compare(t, name+", the incomplete line", s.file.torn, torn)
		compare(t, name, contents(s), states[lines-inSnapshot])
		if cut%5 == snapshot%5 { // a start is slow
			wantError(t, name, s.start(), nil)
			wantError(t, name, s.commit(somebody(9).signUp("late@example.org")), nil)
			compare(t, name+", after a change", readFiles(t, path).read(t, next), contents(s))
		}
		abandon(s)
	}
}

// TestAFlippedBitIsRejected flips every bit of FILE, except in the last newline: without that a line is torn.
func TestAFlippedBitIsRejected(t *testing.T) {
	t.Parallel()
	values, _ := example(t)
	file, path := strings.Join(values, ""), scratch(t)
	for at := range len(file) - 1 {
		place := "" // in the snapshot, the error may name a later line
		if at >= len(values[0]) {
			place = fmt.Sprintf("line %d: ", 1+strings.Count(file[:at], "\n"))
		}
		for bit := range 8 {
			flipped := []byte(file)
			flipped[at] ^= 1 << bit
			files{dataName: string(flipped)}.rejected(t, path, fmt.Sprintf("bit %d of byte %d flipped", bit, at), place)
		}
	}
}

// TestALostBlock puts zeros where a block was lost. In the last line that is no damage: it was not fsynced.
func TestALostBlock(t *testing.T) {
	values, states := example(t)
	last, path := len(values)-1, scratch(t)
	for at, value := range values {
		n := len(value)
		for _, lost := range [][2]int{{0, 1}, {0, n / 2}, {n / 3, n / 2}, {n - 3, n - 1}, {0, n}, {n / 2, n}, {n - 1, n}} {
			damaged := slices.Clone(values)
			damaged[at] = value[:lost[0]] + strings.Repeat("\x00", lost[1]-lost[0]) + value[lost[1]:]
			f := files{dataName: strings.Join(damaged, "")}
			name := fmt.Sprintf("value %d of %d without the bytes %d", at+1, len(values), lost)
			if at == last {
				compare(t, name, f.read(t, path), states[last-1])
			} else if at < last-1 || lost[1] < n { // else it has lost its newline, and is the last line
				f.rejected(t, path, name, "")
			}
		}
	}
}

// TestLinesOutOfPlace puts whole lines where they do not belong.
func TestLinesOutOfPlace(t *testing.T) {
	values, states := example(t)
	foreign := foreignValues(t)
	path, last := scratch(t), len(values)-1
	// check replaces values, so that there is a fault after the first good ones.
	check := func(name string, from, to, good int, others ...string) {
		t.Helper()
		changed := slices.Replace(slices.Clone(values), from, to, others...)
		place := fmt.Sprintf("line %d: ", strings.Count(strings.Join(values[:good], ""), "\n")+1)
		files{dataName: strings.Join(changed, "")}.rejected(t, path, name, place)
	}
	for n := 1; n <= last; n++ {
		check("a line twice", n, n, n+1, values[n])
		check("an empty line", n, n, n, "\n")
		check("a line of another file", n, n+1, n, foreign[n])
		check("the snapshot again", n, n, n, values[0])
		compare(t, "without the last lines", files{dataName: strings.Join(values[:n], "")}.read(t, path), states[n-1])
		if n < last {
			check("a line missing", n, n+1, n)
			check("lines swapped", n, n+2, n, values[n+1], values[n])
			check("a line moved to the end", n, last+1, n, append(slices.Clone(values[n+1:]), values[n])...)
		}
	}
	files{dataName: foreign[0] + values[1]}.rejected(t, path, "the snapshot of another file", "")
	for line := range strings.Lines(values[0]) {
		files{dataName: strings.Replace(values[0], line, "", 1) + values[1]}.rejected(t, path, "without "+line, "")
		files{dataName: strings.Replace(values[0], line, line+line, 1)}.rejected(t, path, "twice "+line, "")
	}
}

// foreignValues returns a FILE with as many lines as that of example.
func foreignValues(t *testing.T) []string {
	s := newTestStore(t, noSync)
	s.must(somebody(4).signUp("d@example.org"))
	s.restart()
	for n := range 4 {
		s.must(somebody(4).create(ideaID(n), "tea", 5))
	}
	return strings.SplitAfter(s.text(), "}\n")[len(strings.SplitAfter(s.text(), "}\n"))-6:]
}

// crashes are those that the tests look at. A kill loses nothing. A power loss may lose all that was not fsynced, or some
// of it: POSIX does not say in what order bytes and names reach the disk.
var crashes = []string{"a kill", "a power loss", "a loss of bytes", "a loss of half the bytes", "a lost block"}

// TestACrashUnderManyClients checks before each file operation what each kind of crash leaves, while eight people write.
func TestACrashUnderManyClients(t *testing.T) {
	fake := newFakeDisk(t)
	s := newTestStore(t, fake.step)
	fake.before = func(op string) {
		for _, kind := range crashes {
			checkHolds(t, "before "+op+", "+kind, fake.after(kind).left().read(t, s.copied), s.acknowledged())
		}
	}
	s.crowd(8, 5)
}

func checkHolds(t *testing.T, name, state, part string) {
	t.Helper()
	for line := range strings.Lines(part) {
		if !strings.Contains(state, line) {
			t.Errorf("%s lacks %s", name, line)
		}
	}
}

// TestACrashLosesNothing checks before every file operation what each kind of crash leaves: what was acknowledged, and
// and the change under way as a whole or not at all, while nobody sees it yet. The next start may crash, too. On some file
// systems, such as CIFS, the fsync of a directory returns an error.
func TestACrashLosesNothing(t *testing.T) {
	t.Parallel()
	var done []change
	for seed, errno := range []error{nil, syscall.EINVAL, syscall.ENOTSUP} {
		synctest.Test(t, func(t *testing.T) {
			p, ops := newPlayer(t, seed), 0
			p.fake.inject = func(op, path string, do func() error) error {
				if op == "sync" && filepath.Ext(path) == "" {
					return cmp.Or(do(), errno)
				}
				return do()
			}
			p.fake.before = func(op string) {
				when := fmt.Sprintf("before operation %d, %s", ops, op)
				compare(t, when, contents(p.store), after(p.done...))
				p.lookAt(when, p.fake, 1, after(p.done...), after(p.next...))
				ops++
			}
			p.play("")
			p.fake.before("the end")
			if p.compactions != 3 {
				t.Errorf("there were %d compactions under load, want one in each run", p.compactions)
			}
			done = append(done, p.done...)
		})
	}
	for _, field := range reflect.VisibleFields(reflect.TypeFor[change]()) {
		has := func(c change) bool { return !reflect.ValueOf(c).FieldByIndex(field.Index).IsZero() }
		if field.IsExported() && field.Name != "Probe" && !slices.ContainsFunc(done, has) {
			t.Errorf("there was no %s; randomChange must make every kind of change", field.Name)
		}
	}
}

// TestAFailureAtAnyOperation lets each operation fail, with no effect, half of it, or
// all of it. A change is then rejected and never seen, nothing else is lost, and the
// store heals by itself.
func TestAFailureAtAnyOperation(t *testing.T) {
	t.Parallel()
	seen := make(map[string]bool)
	operations := playWithFailures(t, seen, -1, -1)
	for n := range operations {
		playWithFailures(t, seen, n, n)
	}
	commit := slices.Index(operations, "write "+dataName)
	compaction := commit + slices.Index(operations[commit:], "write "+dataName+".tmp")
	for _, first := range []int{commit, commit + 1, compaction} { // commit + 1 is its fsync
		for n := range 8 { // and one of the operations that follow
			playWithFailures(t, seen, first, first+1+n)
		}
	}
}

// playWithFailures returns the names of the operations.
func playWithFailures(t *testing.T, seen map[string]bool, first, second int) (operations []string) {
	for _, effect := range []string{"no effect", "half its effect", "its whole effect"} {
		synctest.Test(t, func(t *testing.T) {
			operations = nil
			p := newPlayer(t, second) // each time with other changes
			p.seen, p.twice = seen, first != second
			p.fake.inject = func(op, path string, do func() error) error {
				n := len(operations)
				operations = append(operations, op+" "+filepath.Base(path))
				if n != first && n != second {
					return do()
				}
				p.failed = p.failed || filepath.Ext(path) != ".tmp"
				switch {
				case effect == "half its effect" && op == "write":
					return halfWrite(path, do)
				case effect == "its whole effect" && (op != "create" || runtime.GOOS != "windows"): // which removes no open file
					do()
				}
				return errInjected
			}
			p.play(fmt.Sprintf("operations %d and %d fail with %s", first, second, effect))
		})
	}
	return operations
}

// A player makes random changes in three runs of the server, on a fake disk.
type player struct {
	*store
	t     *testing.T
	fake  *fakeDisk
	paths []string
	seen  map[string]bool // crashes that were looked at: many leave the same

	random      *rand.Rand
	left        int      // changes to be made in this run
	ids         int      // used so far
	done        []change // what was acknowledged
	next        []change // done, and the change under way
	rejected    []change // done, and a change that was rejected, if it can come true after a kill
	compactions int      // caused by changes
	failed      bool     // an operation on FILE has failed
	twice       bool     // two operations may fail
}

func newPlayer(t *testing.T, seed int) *player {
	paths := []string{scratch(t), scratch(t), scratch(t)}
	random := rand.New(rand.NewPCG(uint64(seed), 0))
	return &player{t: t, fake: newFakeDisk(t), paths: paths, seen: make(map[string]bool), random: random}
}

func (p *player) play(name string) {
	path := p.paths[2]
	for run := range 3 {
		p.store = openTestStore(p.t, path, p.step)
		if p.start() != nil {
			if run > 0 {
				p.t.Errorf("%s: run %d does not start, although there is a FILE", name, run)
			}
			abandon(p.store) // the process ends, and somebody starts another
			p.look(name + ", in a start")
			p.store = startStore(p.t, path, p.step)
		}
		for p.left = 9; p.left > 0; {
			p.insist(name)
		}
		if run == 1 {
			abandon(p.store) // by a kill
			continue
		}
		err := p.close()
		p.look(name + ", in a stop")
		left := readFiles(p.t, path)
		if err == nil && (len(left) != 1 || !json.Valid([]byte(left[dataName]))) {
			p.t.Errorf("%s: a stop leaves %q", name, left)
		}
		abandon(p.store)
	}
}

// insist makes a change, again if it is rejected, until the store has healed.
func (p *player) insist(name string) {
	c := p.randomChange()
	err := p.try(c)
	for attempt := 0; err != nil && attempt < 3; attempt++ {
		time.Sleep(2 * time.Second) // until the store may try again
		synctest.Wait()
		p.lookAt(name+", rejected", p.fake, 0, after(p.done...), after(p.rejected...))
		err = p.try(c)
	}
	time.Sleep(time.Second) // until a compaction has ended
	synctest.Wait()
	p.look(name + ", acknowledged")
	if err != nil || p.fake.misused {
		p.t.Errorf("%s: it does not heal (%v), or writes to a file that it must not trust (%t)", name, err, p.fake.misused)
	}
}

func (p *player) randomChange() change {
	p.left--
	if len(p.done) == 0 {
		return somebody(1).signUp("a@example.org")
	}
	return randomChange(p.random, modelOf(p.done), func() string {
		p.ids++
		return ideaID(p.ids)
	})
}

// try makes a change and notes it, unless it could not be saved.
func (p *player) try(c change) error {
	p.next = append(slices.Clip(p.done), c)
	err := p.commit(c)
	p.rejected = p.done
	if p.twice { // the disk may have failed to take the line back, too
		p.rejected = p.next
	}
	if !errors.Is(err, errNotSaved) {
		err, p.done = nil, p.next
	} else if !p.failed {
		p.t.Errorf("%s is rejected, but FILE has not failed", inJSON(c))
	}
	p.next = p.done
	return err
}

// step waits until all other goroutines do. The fifth change of a run causes a
// compaction.
func (p *player) step(op, path string, do func() error) error {
	synctest.Wait()
	if p.left == 4 && op == "write" && filepath.Ext(path) != ".tmp" {
		p.file.tried = -1 << 30
		p.compactions++
	}
	return p.fake.step(op, path, do)
}

// look compares what there is, and what a crash would leave at rest.
func (p *player) look(when string) {
	p.t.Helper()
	want := after(p.done...)
	compare(p.t, when, contents(p.store), want)
	p.lookAt(when, p.fake, 0, want)
}

// lookAt checks what each kind of crash would leave and, if again is 1, what another crash during the next start would.
// What that start has shown must be durable.
func (p *player) lookAt(when string, d *fakeDisk, again int, want ...string) {
	for _, kind := range crashes {
		next, when := d.after(kind), when+", "+kind
		key := fmt.Sprint(next.left(), next.after("a power loss").left(), want, again)
		if p.seen[key] {
			continue
		}
		p.seen[key] = true
		got := next.left().read(p.t, p.paths[again])
		if !slices.Contains(want, got) {
			compare(p.t, when, got, want[0])
		} else if again > 0 {
			next.before = func(op string) {
				p.lookAt(when+", and in the next start before "+op, next, again-1, want...)
			}
			s := startStore(p.t, p.paths[again], next.step)
			p.lookAt(when+", and after the next start", next, again-1, got)
			next.before = nil
			s.commit(somebody(9).signUp("late@example.org")) // to FILE, whose name must be durable
			p.lookAt(when+", and after a change then", next, again-1, contents(s))
			abandon(s)
		}
	}
}

// A fakeDisk knows what a disk may lose if it is not fsynced: the bytes of a file, and which file has a name.
type fakeDisk struct {
	t             testing.TB
	mu            sync.Mutex
	files         []fakeFile
	live, durable map[string]int  // the index of the file with this name
	before        func(op string) // called before each operation
	inject        disk
	misused       bool // a file was written to after it broke
}

type fakeFile struct {
	synced, written string
	broken          bool // an fsync or a truncation has failed
}

func newFakeDisk(t testing.TB) *fakeDisk {
	return &fakeDisk{t: t, inject: realDisk, live: make(map[string]int), durable: make(map[string]int)}
}

// after returns the disk as it is after a crash.
func (d *fakeDisk) after(kind string) *fakeDisk {
	next := &fakeDisk{t: d.t, inject: realDisk, files: slices.Clone(d.files), live: maps.Clone(d.live), durable: maps.Clone(d.live)}
	switch kind {
	case "a kill": // a later power loss can still lose what was not fsynced
		next.durable = maps.Clone(d.durable)
		return next
	case "a power loss":
		next.live, next.durable = maps.Clone(d.durable), maps.Clone(d.durable)
	}
	for n, f := range d.files {
		rest := f.written[min(len(f.synced), len(f.written)):] // a truncation can be lost, too
		switch half := len(rest) / 2; kind {
		case "a loss of half the bytes":
			rest = rest[:half]
		case "a lost block":
			rest = strings.Repeat("\x00", half) + rest[half:]
		default:
			rest = ""
		}
		next.files[n] = fakeFile{synced: f.synced + rest, written: f.synced + rest}
	}
	return next
}

// left returns the files that there are, whether fsynced or not.
func (d *fakeDisk) left() files {
	f := make(files)
	for name, at := range d.live {
		f[name] = d.files[at].written
	}
	return f
}

func (d *fakeDisk) step(op, path string, do func() error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	name := filepath.Base(path)
	if d.before != nil {
		d.before(op + " " + name)
	}
	happened := false // the disk may have done it, even if it says otherwise
	err := d.inject(op, path, func() error {
		err := noSync(op, path, do)
		happened = err == nil
		return err
	})
	at, isFile := d.live[name]
	switch {
	case !happened:
	case op == "create":
		d.live[name] = len(d.files)
		d.files = append(d.files, fakeFile{})
	case op == "rename":
		d.live[name] = d.live[name+".tmp"]
		delete(d.live, name+".tmp")
	case !isFile: // the directory is fsynced
		d.durable = maps.Clone(d.live)
	case op == "sync":
		d.files[at].synced = d.files[at].written
	default:
		d.files[at].written = readFile(d.t, path)
	}
	if isFile && op == "write" {
		d.misused = d.misused || d.files[at].broken
	} else if isFile && err != nil && op != "rename" {
		d.files[at].broken = true
	}
	return err
}

// TestABrokenFile lets an fsync fail and then the truncation, so FILE keeps a line
// that was rejected. The store tries to heal once a second, GET /healthz tells, and a
// stop removes the line.
func TestABrokenFile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		failing, attempts := false, 0
		s := newTestStore(t, func(op, path string, do func() error) error {
			if op == "create" {
				attempts++
			}
			if failing && op != "write" {
				return errInjected
			}
			return noSync(op, path, do)
		})
		s.must(somebody(1).signUp("a@example.org"))
		s.restart()
		log := new(syncBuffer)
		s.logger = slog.New(slog.NewTextHandler(log, nil))
		before := readFiles(t, s.file.path)
		failing, attempts = true, 0
		wantError(t, "a change", s.commit(somebody(1).logOut("", 1)), errNotSaved)
		for n := range 6 {
			atOnce(3, func(int) { wantError(t, "a change", s.commit(somebody(1).logOut("", 1)), errNotSaved) })
			wantError(t, "checkHealth", s.checkHealth(), errNotSaved)
			synctest.Wait()
			compare(t, "the attempts to heal", attempts, 1+n/2)
			time.Sleep(time.Second / 2)
		}
		compare(t, "the lines in the log", strings.Count(log.String(), "\n"), 1)
		failing = false
		wantError(t, "a stop", s.close(), nil)
		compare(t, "the files", readFiles(t, s.file.path), before)
	})
}

// TestAStartThatCannotWrite starts on a disk that fails, with files that must be
// mended. Reads work, changes are rejected, and it heals by itself. Only without FILE
// there is no start.
func TestAStartThatCannotWrite(t *testing.T) {
	values, states := example(t)
	all := strings.Join(values, "")
	for name, test := range map[string]struct{ file, want string }{
		"intact":                {all, states[4]},
		"with an unended line":  {strings.TrimSpace(all), states[4]},
		"with a torn line":      {all[:len(all)-9], states[3]},
		"edited by hand":        {checksum.ReplaceAllString(values[0], ""), states[0]},
		"with a left-over .tmp": {all, states[4]},
	} {
		synctest.Test(t, func(t *testing.T) {
			path, failing := scratch(t), true
			files{dataName: test.file, dataName + ".tmp": "half"}.write(t, path)
			s := openTestStore(t, path, func(op, path string, do func() error) error {
				if failing {
					return errInjected
				}
				return noSync(op, path, do)
			})
			wantError(t, name, s.start(), nil)
			compare(t, name, readFiles(t, path), files{dataName: test.file})
			for range 2 {
				compare(t, name, contents(s), test.want)
				wantError(t, name+", a change", s.commit(somebody(9).signUp("late@example.org")), errNotSaved)
				wantError(t, name+", checkHealth", s.checkHealth(), errNotSaved)
			}
			time.Sleep(time.Second)
			failing = false
			wantError(t, name+", checkHealth", s.checkHealth(), nil)
			wantError(t, name+", a change", s.commit(somebody(9).signUp("late@example.org")), nil)
			compare(t, name, readFiles(t, path).read(t, scratch(t)), contents(s))
		})
	}
	s := openTestStore(t, scratch(t), func(string, string, func() error) error { return errInjected })
	wantError(t, "a start without FILE", s.start(), errInjected)
}

// TestKillUnderLoad kills the server under the load of 16 clients, over the same file, and once more in each start.
func TestKillUnderLoad(t *testing.T) {
	rounds := 3
	if *long {
		rounds = 60
	}
	path, users := newLoadUsers(t)
	for range rounds {
		early := startProcess(t, path)
		time.Sleep(rand.N(60 * time.Millisecond))
		early.kill()
		p := startProcess(t, path, "-quiet")
		p.underLoad(t, users, 100+rand.IntN(2000), os.Kill)
		p.w.Close()
		if log := readAll(t, p.log); strings.Contains(log, "DATA RACE") || strings.Contains(log, "panic") {
			t.Error(log)
		}
		checkUsers(t, path, users)
	}
}

// TestTerminateUnderLoad stops the server in the orderly way. If its log has lost its reader, requests go on; if the
// pipe is full, they hang until the stop ends them after a while.
func TestTerminateUnderLoad(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	for _, log := range []string{"is quiet", "has no reader", "is full"} {
		if log == "is full" && !*long {
			continue // it takes ten seconds
		}
		path, users := newLoadUsers(t)
		p, writes := startProcess(t, path, fmt.Sprint("-quiet=", log == "is quiet")), 500
		p.waitForURL()
		switch log {
		case "has no reader":
			p.r.Close()
		case "is full":
			p.w.Write(make([]byte, 65_000)) // of 64 KiB: there is room for three requests
			writes = 2
		}
		p.underLoad(t, users, writes, syscall.SIGTERM)
		left := readFiles(t, path)
		if !p.ProcessState.Success() || len(left) != 1 || !json.Valid([]byte(left[dataName])) {
			t.Errorf("its log %s: %s, and the stop leaves %.100q, want one document", log, p.ProcessState, left)
		}
		checkUsers(t, path, users)
	}
}

// TestTerminateAtOnce ends the start with a large FILE, and then, by another signal, a stop that waits for a request.
func TestTerminateAtOnce(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("it has no signals")
	}
	path, ann := scratch(t), somebody(1)
	creates := strings.Repeat(",\n"+inJSON(ann.create(ideaID(1), "tea", 5)), 200_000)
	before := files{dataName: header + inJSON(ann.signUp("a@example.org")) + creates + "]}"}
	before.write(t, path)
	p := startProcess(t, path)
	for _, err := os.Stat(path + ".lock"); err != nil; _, err = os.Stat(path + ".lock") {
		time.Sleep(time.Millisecond) // it is made before FILE is read
	}
	p.Process.Signal(syscall.SIGTERM)
	p.Wait()
	compare(t, "the end of a start", p.ProcessState, "signal: terminated")
	compare(t, "FILE", readFiles(t, path), before)

	p = startProcess(t, scratch(t))
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.waitForURL(), "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	io.WriteString(conn, "POST /users HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n")
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") { // then the handler waits for the body
		t.Fatalf("got %q, %v, want 100 Continue", line, err)
	}
	go func() {
		for p.Process.Signal(syscall.SIGTERM) == nil {
			time.Sleep(10 * time.Millisecond)
		}
	}()
	p.Wait()
	compare(t, "the end of a stop", p.ProcessState, "signal: terminated")
}

// TestLogoutSurvivesAKill logs in again in the second of the old login: the new token could equal the old one.
func TestLogoutSurvivesAKill(t *testing.T) {
	path := scratch(t)
	p := startProcess(t, path)
	body, _ := p.send(t, 201, "", "POST /users", jacksSignUp)
	for range 3 {
		old, refresh := member(body, "jwt"), `{"refresh_token":"`+member(body, "refresh_token")+`"}`
		p.send(t, 204, old, "DELETE /access-tokens", refresh)
		p.kill()
		p = startProcess(t, path)
		p.send(t, 401, old, "GET /me", "")
		p.send(t, 400, "", "POST /access-tokens/refresh", refresh)
		body, _ = p.send(t, 201, "", "POST /access-tokens", jacksLogin)
		p.send(t, 200, member(body, "jwt"), "GET /me", "")
	}
}

// TestAPanicEndsTheProcess: a panic in apply must end the process, as memory may be half changed.
func TestAPanicEndsTheProcess(t *testing.T) {
	if path := os.Getenv("IDEAPOOL_TEST_PANIC"); path != "" {
		defer func() { recover() }() // as net/http would
		s := startStore(t, path, realDisk)
		s.accounts = nil
		s.commit(somebody(1).signUp("a@example.org"))
		return
	}
	path := scratch(t)
	command := exec.Command(os.Args[0], "-test.run=^"+t.Name()+"$", "-test.timeout=20s") // if it hangs instead
	command.Env = append(os.Environ(), "IDEAPOOL_TEST_PANIC="+path)
	output, err := command.CombinedOutput()
	if command.ProcessState.ExitCode() != 2 || !strings.Contains(string(output), "assignment to entry in nil map") {
		t.Errorf("got %v, want status 2:\n%s", err, output)
	}
	compare(t, "the next start", readFiles(t, path).read(t, path), after(somebody(1).signUp("a@example.org")))
}

// halfWrite writes only half, as when the disk becomes full.
func halfWrite(path string, do func() error) error {
	before, _ := os.Stat(path)
	if err := do(); err != nil {
		return err
	}
	after, err := os.Stat(path)
	if err != nil {
		return err
	}
	os.Truncate(path, (before.Size()+after.Size())/2)
	return syscall.ENOSPC
}

// A process is the server in a process of its own.
type process struct {
	*exec.Cmd
	r, w       *os.File // its stderr
	log        *bufio.Reader
	waitForURL func() string
}

func startProcess(t *testing.T, path string, flags ...string) *process {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	flags = append(flags, "-addr", "127.0.0.1:0", "-data", path, "-key", rfcKeyFile)
	p := &process{Cmd: exec.Command(os.Args[0], flags...), r: r, w: w, log: bufio.NewReader(r)}
	p.waitForURL = sync.OnceValue(func() (url string) {
		for url == "" {
			line, err := p.log.ReadString('\n')
			if err != nil {
				panic("the server prints no address: " + err.Error())
			}
			url = regexp.MustCompile(`http://127.*|$`).FindString(line)
		}
		return url
	})
	p.Env, p.Stderr = append(os.Environ(), serveEnv+"=1"), w
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.Process.Kill() // fails if it has exited
	p.Wait()
	p.r.Close()
	p.w.Close()
}

// send returns the body of a response, if all of it arrives.
func (p *process) send(t *testing.T, status int, access, request, body string) (response string, ok bool) {
	t.Helper()
	method, path, _ := strings.Cut(request, " ")
	r, err := http.NewRequestWithContext(t.Context(), method, p.waitForURL()+path, strings.NewReader(body))
	if err != nil {
		t.Error(err)
		return "", false
	}
	r.Header.Set("X-Access-Token", access)
	got, err := httpClient.Do(r)
	if err != nil {
		return "", false
	}
	defer got.Body.Close()
	data, err := io.ReadAll(got.Body)
	if err == nil && got.StatusCode != status {
		t.Errorf("%s: got %d, want %d: %s", request, got.StatusCode, status, data)
	}
	return string(data), err == nil && got.StatusCode == status
}

// httpClient gives up when the connection of a killed server stays open, as happens under Wine.
var httpClient = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}, Timeout: 20 * time.Second}

// underLoad has 16 clients at work until, after so many acknowledged writes, the server gets a signal.
func (p *process) underLoad(t *testing.T, users []*loadUser, writes int, end os.Signal) {
	var acknowledged atomic.Int64
	atOnce(16, func(n int) {
		for users[n+16*rand.IntN(len(users)/16)].change(t, p) {
			if acknowledged.Add(1) == int64(writes) {
				time.AfterFunc(rand.N(3*time.Millisecond), func() { p.Process.Signal(end) })
			}
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	p.Wait() // how it ended is in its ProcessState
}

// A loadUser has at most one idea.
type loadUser struct {
	id, access string
	idea       string // the last response: JSON, or nothing after a delete
	underWay   string // a part of the JSON after a change that had no response, or nothing after such a delete
}

// newLoadUsers makes 128 users, and a FILE that knows them, so that no hashes need to be computed first.
func newLoadUsers(t *testing.T) (path string, users []*loadUser) {
	s, tokens := newTestStore(t, noSync), newTokens(rfcKey(t))
	for n := range 128 {
		p := person(s.ids.next())
		s.must(p.signUp(fmt.Sprintf("%d@example.org", n)))
		users = append(users, &loadUser{id: string(p), access: sign(t, tokens, claims{UserID: string(p), Expires: 1e10})})
	}
	abandon(s.store)
	return s.file.path, users
}

// change creates, updates or deletes the idea. It returns false if there is no response.
func (u *loadUser) change(t *testing.T, p *process) bool {
	request, status := "POST /ideas", 201
	u.underWay = fmt.Sprintf(`"content":"%d","impact":5,"ease":5,"confidence":5`, rand.Uint64())
	if u.idea != "" {
		request, status = "PUT /ideas/"+member(u.idea, "id"), 200
	}
	if u.idea != "" && rand.IntN(2) == 0 {
		request, status, u.underWay = "DELETE /ideas/"+member(u.idea, "id"), 204, ""
	}
	response, ok := p.send(t, status, u.access, request, "{"+u.underWay+"}")
	if ok {
		u.idea, u.underWay = response, response
	}
	return ok
}

// checkUsers compares what there is with the responses. A change without one may have happened or not.
func checkUsers(t *testing.T, path string, users []*loadUser) {
	t.Helper()
	s := openTestStore(t, path, realDisk)
	defer abandon(s)
	for _, u := range users {
		ideas := pages(s, u.id)
		got := strings.Join(ideas, " ")
		happened := len(ideas) < 2 && strings.Contains(got, u.underWay) && (got == "") == (u.underWay == "")
		if got != u.idea && !happened {
			t.Errorf("got the ideas %q, want %q, or with %q", got, u.idea, u.underWay)
		}
		u.idea, u.underWay = got, got
	}
}
